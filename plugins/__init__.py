"""The parts that ship with llava_kit.  They register through the same entry points as everybody else's."""

"""``python -m llava_kit``."""

from llava_kit.cli import main

main()

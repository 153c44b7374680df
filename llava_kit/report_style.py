"""The style sheet of the report: light and dark, from a phone to a wide screen, and on paper."""

CSS = """
:root { color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1f2328; --soft: #646a73; --rule: #e4e1d9;
  --accent: #2f5fd0; --warm: #c05a1c; --right: #1d7a46; --wrong: #b3322b; --shade: #f1efe9; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #16181c; --card: #1d2025; --ink: #e6e4df; --soft: #9aa0a9; --rule: #32363d;
  --accent: #7ea2ff; --warm: #f0985a; --right: #6ecb93; --wrong: #f28b82; --shade: #25292f; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main, header, footer { max-width: 68rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 3.5rem; }
h1, h2 { font-family: "Iowan Old Style", Charter, "Palatino Linotype", Palatino, Georgia, serif;
  font-weight: 600; line-height: 1.15; letter-spacing: -0.01em; margin: 0; text-wrap: balance; }
h1 { font-size: clamp(2rem, 6vw, 3.1rem); }
h2 { font-size: 1.55rem; margin-top: 3.5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { max-width: 42rem; margin: .6rem 0; }
.eyebrow { color: var(--soft); font-size: .8rem; letter-spacing: .09em; text-transform: uppercase; margin: 0 0 .6rem; }
.lede, .note { color: var(--soft); }
.lede { font-size: 1.1rem; }
.note { font-size: .9rem; }
nav { margin-top: 1.6rem; padding: .7rem 0; border: solid var(--rule); border-width: 1px 0; font-size: .9rem;
  display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
table.wide { width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .5rem 1.2rem .5rem 0; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; } thead th { color: var(--soft); font-size: .82rem; font-weight: 500; }
td.number, th.number { text-align: right; white-space: nowrap; }
.scores td.number { font-size: 1.15rem; font-weight: 600; min-width: 7rem; }
.scores tr.control td, .scores tr.control th { color: var(--soft); font-weight: 400; }
.scores tr.part td, .scores tr.part th { font-weight: 400; font-size: .92rem; padding: .3rem 1.2rem .3rem 0; }
.scores tr.part th { padding-left: 1.2rem; } .part .bar i { opacity: .55; }
.bar { display: block; height: 4px; margin-top: .3rem; border-radius: 2px; background: var(--shade); }
.bar i { display: block; height: 100%; border-radius: 2px; background: var(--accent); }
.control .bar i { background: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: .9rem; }
figcaption { font-weight: 600; margin-bottom: .3rem; } figcaption span { color: var(--soft); font-weight: 400; }
svg { display: block; width: 100%; height: auto; }
svg .grid { stroke: var(--rule); } svg .tick { stroke: var(--soft); }
svg .axis { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg path { fill: none; stroke-linejoin: round; }
svg path.raw { stroke: var(--accent); opacity: .28; } svg circle.raw { fill: var(--accent); opacity: .5; }
svg path.line { stroke: var(--accent); stroke-width: 2.2; } svg circle.line { fill: var(--accent); }
svg circle.points { fill: var(--card); stroke: var(--warm); stroke-width: 2.2; }
.key { display: inline-block; width: 1.4em; height: .22em; margin-right: .35em; vertical-align: middle;
  background: var(--accent); border-radius: 2px; }
.key.raw { opacity: .3; } .key.points { width: .65em; height: .65em; border-radius: 50%; background: var(--card);
  border: 2px solid var(--warm); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); gap: 1.2rem;
  margin-top: 1.2rem; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 1rem; display: flex;
  gap: 1rem; align-items: flex-start; }
.card > .seen { flex: 0 0 7.5rem; display: grid; gap: .5rem; }
.card > div:last-child { flex: 1; min-width: 0; }
.card img, .lost { width: 100%; border-radius: 6px; display: block; background: var(--shade); }
.card img.small { image-rendering: pixelated; }
.lost { color: var(--soft); font-size: .75rem; padding: 1.6rem .4rem; text-align: center; }
.asked { margin: 0 0 1rem; } .asked:last-child { margin-bottom: 0; }
.asked p { margin: 0; font-weight: 600; line-height: 1.35; white-space: pre-wrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: .3rem 0 0; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; white-space: pre-wrap; }
.right { color: var(--right); } .wrong { color: var(--wrong); } .partly { color: var(--warm); }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--accent); }
pre { background: var(--shade); border-radius: 8px; padding: 1rem; overflow-x: auto; font-size: .82rem; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
footer { margin-top: 4rem; padding-bottom: 3rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 30rem) { header { padding-top: 2rem; } .card > .seen { flex-basis: 5.2rem; }
  th, td { padding-right: .8rem; } .scores td.number { min-width: 5rem; } }
@media print { nav { display: none; } .card, figure { break-inside: avoid; } }
"""

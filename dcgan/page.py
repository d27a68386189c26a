"""How a run's report looks and what little it does: its style sheet, and its script, without which all can be read.

The curves' colours follow the Okabe-Ito palette, which any colour vision tells apart; dark pages get lighter ones.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbf9; --pane: #fff; --ink: #1c1d1f; --soft: #62656b; --line: #e3e3de;
  --c0: #0072b2; --c1: #d55e00; --c2: #00805d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131416; --pane: #1b1c1f; --ink: #e9e9e6; --soft: #9b9ea5; --line: #313338;
    --c0: #56b4e9; --c1: #f0a030; --c2: #5fd3ac;
  }
}
* { box-sizing: border-box }
body {
  margin: 0 auto; max-width: 1120px; padding: 40px 24px 56px;
  background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
h1 { margin: 0; font-size: 28px; line-height: 1.2; letter-spacing: -.015em; font-weight: 650; text-wrap: balance }
h2 { margin: 48px 0 16px; font-size: 18px; letter-spacing: -.005em; font-weight: 650 }
h3 { margin: 0; font-size: 15px; font-weight: 600 }
p { margin: 4px 0 }
figure { margin: 0 }
img { display: block; width: 100%; height: auto; border-radius: 4px }
.pair .small { image-rendering: pixelated }
.mono { font: 13px/1.6 ui-monospace, Menlo, Consolas, monospace }
.soft, figcaption, dt, th, .ticks, footer { color: var(--soft) }

.facts {
  display: grid; grid-template-columns: repeat(6, auto); gap: 20px 24px;
  margin: 28px 0 0; padding: 18px 0; border: solid var(--line); border-width: 1px 0;
}
.facts dt { font-size: 13px }
.facts dd { margin: 0; font-size: 21px; line-height: 1.3; font-weight: 600; white-space: nowrap }
.facts small { font-size: 13px; font-weight: 400; color: var(--soft) }

.pair, .charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 24px }
.pair figcaption { margin-bottom: 6px }
.pair b { color: var(--ink); font-weight: 600 }
.strip {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)); gap: 12px;
  margin: 20px 0 0; padding: 0; list-style: none; font-size: 12px;
}
.strip button {
  display: block; width: 100%; padding: 0; border: 0; background: none; color: var(--soft);
  font: inherit; text-align: left; cursor: pointer;
}
.strip button:focus-visible { outline: 2px solid var(--ink); outline-offset: 5px; border-radius: 3px }
.strip span { display: block; padding-top: 4px }
.strip [aria-pressed=true] { color: var(--ink); font-weight: 600 }
.strip [aria-pressed=true] img { outline: 2px solid var(--c0); outline-offset: 2px }

.chart {
  display: flex; flex-direction: column; min-width: 0; padding: 16px 16px 12px;
  background: var(--pane); border: 1px solid var(--line); border-radius: 8px;
}
.key { display: flex; flex-wrap: wrap; gap: 0 18px; margin: 2px 0 12px; padding: 0; list-style: none; font-size: 13px }
.key svg { width: 18px; height: 8px; margin-right: 6px }
.key output { display: inline-block; min-width: 3.2em; font-weight: 600; color: var(--ink) }
.key .at { margin-left: auto }
.key .at output { min-width: 0 }
.plot { position: relative; height: 216px; margin: auto 10px 24px 46px; touch-action: pan-y }
.plot > svg { display: block; width: 100%; height: 100%; overflow: visible; clip-path: inset(-3px -8px) }
.charts > :nth-child(3) { grid-column: 1 / -1 }
.charts > :nth-child(3) .plot { height: 140px }
svg path {
  fill: none; stroke-width: 2; stroke-linecap: round; stroke-linejoin: round; vector-effect: non-scaling-stroke;
}
.s0 { stroke: var(--c0) }
.s1 { stroke: var(--c1) }
.s2 { stroke: var(--c2); stroke-dasharray: 5 4 }
.plot .raw { stroke-width: 1; stroke-opacity: .32; stroke-dasharray: none }
.plot .dot { stroke-width: 8; stroke-dasharray: none }
.plot .rule { stroke: var(--line); stroke-width: 1 }
.plot .mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 4 }
.ticks { position: absolute; font-size: 12px; line-height: 1; white-space: nowrap }
.y { right: 100%; padding-right: 8px; transform: translateY(50%) }
.x { top: 100%; padding-top: 8px; transform: translateX(-50%) }
.cursor { position: absolute; top: 0; bottom: 0; border-left: 1px solid var(--soft); pointer-events: none }

.scroll { overflow-x: auto }
table { width: 100%; border-collapse: collapse }
th, td { padding: 6px 24px 6px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { font-weight: 400; font-size: 13px }
th, td:not(:last-child) { white-space: nowrap }
.config { columns: 320px; column-gap: 40px; margin: 8px 0 0 }
.config div {
  display: flex; justify-content: space-between; gap: 16px; padding: 4px 0;
  border-bottom: 1px solid var(--line); break-inside: avoid;
}
.config dt { flex: none }
.config dd { margin: 0; min-width: 0; text-align: right }
section > h3 { margin-top: 20px }
footer { margin-top: 48px; font-size: 13px }

@media (max-width: 980px) {
  .facts { grid-template-columns: repeat(3, 1fr) }
}
@media (max-width: 760px) {
  body { padding: 24px 16px 40px }
  h1 { font-size: 24px }
  .charts { grid-template-columns: minmax(0, 1fr) }
  .pair { gap: 12px }
  .chart { padding: 14px 12px 10px }
}
@media (max-width: 480px) {
  .facts { grid-template-columns: repeat(2, 1fr) }
  .pair { grid-template-columns: minmax(0, 1fr) }
}
"""

SCRIPT = """
for (const plot of document.querySelectorAll('.plot')) {
  const { x, text } = JSON.parse(plot.dataset.points), outputs = plot.parentElement.querySelectorAll('output');
  const cursor = plot.querySelector('.cursor'), last = [...outputs].map(output => output.textContent);
  plot.onpointermove = plot.onpointerdown = event => {
    const box = plot.getBoundingClientRect(), at = (event.clientX - box.left) / box.width;
    const i = x.reduce((best, v, k) => Math.abs(v - at) < Math.abs(x[best] - at) ? k : best, 0);
    cursor.hidden = false;
    cursor.style.left = 100 * x[i] + '%';
    outputs.forEach((output, k) => output.textContent = text[k][i]);
  };
  plot.onpointerleave = () => {
    cursor.hidden = true;
    outputs.forEach((output, k) => output.textContent = last[k]);
  };
}
const buttons = [...document.querySelectorAll('.strip button')], large = document.getElementById('large');
const show = button => {
  buttons.forEach(other => other.setAttribute('aria-pressed', other === button));
  const image = button.querySelector('img');
  large.src = image.src;
  large.alt = image.alt;
  document.getElementById('caption').textContent = button.textContent;
};
buttons.forEach((button, i) => {
  button.onclick = () => show(button);
  button.onkeydown = event => {
    const next = buttons[i + { ArrowLeft: -1, ArrowRight: 1 }[event.key]];
    if (next) { next.focus(); show(next); }
  };
});
"""

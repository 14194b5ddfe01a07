"""The page of ``quartet report``: its style and the script that draws the timeline. No address outside the
page."""

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #222; margin: 24px auto; max-width: 1240px; padding: 0 16px }
h1 { margin: 0 0 4px } h2 { margin: 32px 0 8px; border-bottom: 1px solid #ddd } h3 { margin: 16px 0 4px }
.sub { color: #666; margin: 0 0 16px } .tiles { display: flex; flex-wrap: wrap; gap: 10px }
.tile { border: 1px solid #ddd; border-radius: 6px; padding: 8px 14px; min-width: 110px }
.tile b { display: block; font-size: 20px } .tile span { color: #666; font-size: 12px }
.charts { display: flex; flex-wrap: wrap; gap: 6px } table { border-collapse: collapse; font-size: 13px }
td, th { border-bottom: 1px solid #eee; padding: 3px 10px; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 420px; font-family: ui-monospace, monospace }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin: 0 4px 0 12px }
canvas { width: 100%; border: 1px solid #ddd; cursor: grab } pre { background: #f7f7f7; padding: 10px; overflow: auto }
#tip { position: fixed; background: #222; color: #fff; padding: 4px 8px; border-radius: 4px; font-size: 12px;
  pointer-events: none; display: none } button { margin-right: 6px }
@media print { canvas { break-inside: avoid } }
"""

# Rows are drawn from data = {rows: [name], events: [[row, start, end, name, note]], colours: {name: colour},
# first: [start, end]}, all times in seconds. The wheel zooms at the pointer, dragging moves.
SCRIPT = """
const canvas = document.getElementById('timeline'), tip = document.getElementById('tip');
const LEFT = 150, ROW = 24, TOP = 22;
let [from, to] = data.first;
const whole = [0, Math.max(...data.events.map(e => e[2]))];
function draw() {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = TOP + ROW * data.rows.length + 4;
  canvas.style.height = height + 'px'; canvas.width = width * ratio; canvas.height = height * ratio;
  const c = canvas.getContext('2d'); c.scale(ratio, ratio); c.font = '11px sans-serif';
  const x = t => LEFT + (t - from) / (to - from) * (width - LEFT);
  const rough = (to - from) / 8, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(f => f * power).find(s => s >= rough);
  c.fillStyle = '#666';
  for (let t = Math.ceil(from / step) * step; t <= to; t += step) {
    c.fillRect(x(t), TOP - 4, 1, height); c.fillText(+t.toPrecision(8) + ' s', x(t) + 3, 12);
  }
  c.fillStyle = '#fff'; c.globalAlpha = 0.75; c.fillRect(LEFT, TOP, width, height); c.globalAlpha = 1;
  for (const [row, start, end, name] of data.events) {
    if (end < from || start > to) continue;
    const left = Math.max(LEFT, x(start)), wide = Math.max(0.6, Math.min(width, x(end)) - left), y = TOP + row * ROW;
    c.fillStyle = data.colours[name] || '#e9eef4'; c.fillRect(left, y + 2, wide, ROW - 4);
    if (wide > 50 && name !== 'wait') { c.fillStyle = row ? '#fff' : '#222'; c.fillText(name, left + 4, y + 16, wide - 6); }
  }
  c.fillStyle = '#fff'; c.fillRect(0, 0, LEFT, height); c.fillStyle = '#222';
  data.rows.forEach((name, row) => c.fillText(name, 4, TOP + row * ROW + 16));
}
function at(event) {
  const box = canvas.getBoundingClientRect(), px = event.clientX - box.left;
  return [from + (px - LEFT) / (box.width - LEFT) * (to - from), Math.floor((event.clientY - box.top - TOP) / ROW)];
}
canvas.addEventListener('wheel', event => {
  event.preventDefault(); const [t] = at(event), f = Math.exp(event.deltaY * 0.002);
  from = Math.max(whole[0], t + (from - t) * f); to = Math.min(whole[1], t + (to - t) * f); draw();
}, { passive: false });
let grip = null;
canvas.addEventListener('mousedown', event => grip = at(event)[0]);
window.addEventListener('mouseup', () => grip = null);
canvas.addEventListener('mousemove', event => {
  const [t, row] = at(event);
  if (grip !== null) {
    const by = Math.max(whole[0] - from, Math.min(whole[1] - to, grip - t)); from += by; to += by; draw(); return;
  }
  const hit = data.events.find(e => e[0] === row && e[1] <= t && t <= e[2]);
  tip.style.display = hit ? 'block' : 'none';
  if (!hit) return;
  tip.style.left = Math.min(event.clientX + 12, innerWidth - 260) + 'px'; tip.style.top = event.clientY + 12 + 'px';
  tip.textContent = `${hit[3]}${hit[4] ? ' for ' + hit[4] : ''}  ${((hit[2] - hit[1]) * 1000).toFixed(1)} ms  (from ${hit[1].toFixed(3)} s)`;
});
canvas.addEventListener('mouseleave', () => tip.style.display = 'none');
document.getElementById('all').onclick = () => { [from, to] = whole; draw(); };
document.getElementById('first').onclick = () => { [from, to] = data.first; draw(); };
window.addEventListener('resize', draw); draw();
"""

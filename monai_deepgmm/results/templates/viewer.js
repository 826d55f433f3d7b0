// The viewer: slices of a patient from sprites, drawn on canvases. Nothing is fetched.
const root = document.getElementById("viewer");
if (root) (async () => {
const meta = JSON.parse(root.dataset.meta), [D, H, W] = meta.shape, [dz, dy, dx] = meta.mm;
const $ = query => root.querySelector(query), make = tag => document.createElement(tag);
const read = async (image, k) => {
  await image.decode();
  const canvas = make("canvas"), g = canvas.getContext("2d", {willReadFrequently: true});
  [canvas.width, canvas.height] = [W, D * H];
  g.drawImage(image, 0, 0);
  const rgba = g.getImageData(0, 0, W, D * H).data;
  return {...meta.layers[k], data: Uint8Array.from({length: D * H * W}, (_, i) => rgba[4 * i])};
};
const layers = await Promise.all([...root.querySelectorAll("img")].map(read));
const images = layers.filter(l => l.kind === "image"), layer = kind => layers.find(l => l.kind === kind);
const [left, right, top, bottom] = meta.edges;
const planes = [
  {name: "axial", n: D, h: H, w: W, my: dy, mx: dx, edges: meta.edges, of: (k, y, x) => (k * H + y) * W + x},
  {name: "coronal", n: H, h: D, w: W, my: dz, mx: dx, edges: [left, right, "S", "I"],
    of: (k, y, x) => ((D - 1 - y) * H + k) * W + x},
  {name: "sagittal", n: W, h: D, w: H, my: dz, mx: dy, edges: [top, bottom, "S", "I"],
    of: (k, y, x) => ((D - 1 - y) * H + x) * W + k},
].slice(0, meta.planes);
const first = meta.planes === 3 ? D >> 1 : Math.max(0, meta.inside.indexOf(true));
const middle = meta.planes === 3 ? first : (first + meta.inside.lastIndexOf(true)) >> 1;
const at = [middle, H >> 1, W >> 1];
// A brain's contours are too dense to begin with.
const state = {seq: "0", overlay: meta.planes === 3 ? "fill" : "contours", mask: false, uncertainty: false,
  reference: false, opacity: +$("#opacity").value};
const windows = images.map(() => ({c: .5, w: 1}));
let active = 0, hidden = false, panels = [];

const rgb = color => [1, 3, 5].map(i => parseInt(color.slice(i, i + 2), 16));
const colors = [[0, 0, 0], ...meta.tissues.map(t => rgb(t.color))];
const ramp = root.dataset.ramp.split(" ").map(rgb);
const heat = v => { const t = v / 255 * (ramp.length - 1), i = Math.min(ramp.length - 2, t | 0);
  return ramp[i].map((a, c) => a + (ramp[i + 1][c] - a) * (t - i)); };
const range = (image, k) => { const [, b, c] = image.knots[k], {c: m, w} = windows[images.indexOf(image)];
  return [b + (c - b) * (m - w / 2), b + (c - b) * (m + w / 2)]; };
const greys = (image, k) => { const [a, b, c, d] = image.knots[k], [low, high] = range(image, k);
  return Uint8ClampedArray.from({length: 256}, (_, v) => 255 / (high - low) * ((v < 40 ? a + (b - a) * v / 40 :
    v < 215 ? b + (c - b) * (v - 40) / 175 : c + (d - c) * (v - 215) / 40) - low)); };
const plane = (data, p, k) => { const out = new Uint8Array(p.h * p.w);
  for (let y = 0, i = 0; y < p.h; y++) for (let x = 0; x < p.w; x++) out[i++] = data[p.of(k, y, x)];
  return out; };
const painted = (p, values, color) => { const small = make("canvas"), g = small.getContext("2d");
  [small.width, small.height] = [p.w, p.h];
  const to = g.createImageData(p.w, p.h);
  values.forEach((v, i) => to.data.set(color(v), 4 * i));
  g.putImageData(to, 0, 0);
  return small; };
// A strip along each side of a pixel whose neighbour is another tissue, on the inner side: both tissues keep theirs.
const outline = (g, p, n, sx, sy, color, thick, dash) => {
  for (let y = 0, i = 0; y < p.h; y++) for (let x = 0; x < p.w; x++, i++) {
    const v = n[i];
    if (!v) continue;
    g.fillStyle = `rgb(${color(v)})`;
    const X = x * sx, Y = y * sy, a = dash ? .2 : 0, l = 1 - 2 * a;
    if (!x || n[i - 1] !== v) g.fillRect(X, Y + a * sy, thick, l * sy);
    if (x === p.w - 1 || n[i + 1] !== v) g.fillRect(X + sx - thick, Y + a * sy, thick, l * sy);
    if (!y || n[i - p.w] !== v) g.fillRect(X + a * sx, Y, l * sx, thick);
    if (y === p.h - 1 || n[i + p.w] !== v) g.fillRect(X + a * sx, Y + sy - thick, l * sx, thick);
  }
};
const text = (g, words, x, y, align, ratio, base = "middle") => {
  Object.assign(g, {font: `600 ${12 * ratio}px system-ui, sans-serif`, textAlign: align, textBaseline: base,
    strokeStyle: "#000", lineWidth: 3 * ratio, fillStyle: "#fff", lineJoin: "round"});
  g.strokeText(words, x, y); g.fillText(words, x, y); };
const draw = ({canvas, p, image}) => {
  const ratio = devicePixelRatio || 1, k = at[planes.indexOf(p)], wide = Math.round(canvas.clientWidth * ratio);
  if (!wide) return;
  const tall = Math.round(wide * p.h * p.my / (p.w * p.mx)), knot = meta.planes === 3 ? 0 : k;
  if (canvas.width !== wide || canvas.height !== tall) [canvas.width, canvas.height] = [wide, tall];
  const g = canvas.getContext("2d"), sx = wide / p.w, sy = tall / p.h, lut = greys(image, knot);
  g.imageSmoothingQuality = "high";
  g.drawImage(painted(p, plane(image.data, p, k), v => [lut[v], lut[v], lut[v], 255]), 0, 0, wide, tall);
  g.imageSmoothingEnabled = false;
  const both = plane(layer("labels").data, p, k), labels = both.map(v => v & 127), shown = state.overlay !== "off";
  const over = small => { g.drawImage(small, 0, 0, wide, tall); g.globalAlpha = 1; };
  if (!hidden) {
    g.globalAlpha = state.opacity / 100;
    if (state.uncertainty) {
      const unsure = plane(layer("entropy").data, p, k), hot = [...Array(256).keys()].map(heat);
      over(painted(p, unsure.map((v, i) => both[i] > 127 ? v || 1 : 0), v => [...hot[v], v ? 255 : 0]));
    } else if (state.overlay === "fill") over(painted(p, labels, v => [...colors[v], v ? 255 : 0]));
    g.globalAlpha = 1;
    const thick = meta.planes === 3 ? ratio : Math.max(1.7 * ratio, Math.min(2.2 * ratio, sx / 2));
    if (shown && (meta.planes === 1 || state.overlay === "contours")) outline(g, p, labels, sx, sy, v => colors[v], thick);
    if (state.mask) outline(g, p, both.map(v => v >> 7), sx, sy, () => [90, 225, 235], thick);
    if (state.reference && layer("reference"))
      outline(g, p, plane(layer("reference").data, p, k), sx, sy, v => colors[v].map(c => 128 + c / 2), thick, true);
  }
  if (meta.planes === 3) {
    const [x, y] = p === planes[0] ? [at[2], at[1]] : [p === planes[1] ? at[2] : at[1], D - 1 - at[0]];
    g.fillStyle = "rgba(255,255,255,.35)";
    g.fillRect((x + .5) * sx, 0, ratio, tall); g.fillRect(0, (y + .5) * sy, wide, ratio);
  }
  const e = p.edges, pad = 6 * ratio;
  text(g, e[0], pad, tall / 2, "left", ratio); text(g, e[1], wide - pad, tall / 2, "right", ratio);
  text(g, e[2], wide / 2, pad, "center", ratio, "top"); text(g, e[3], wide / 2, tall - pad, "center", ratio, "bottom");
  text(g, meta.planes === 3 ? `${image.name} ${p.name}` : image.name, pad, pad, "left", ratio, "top");
  const [low, high] = range(image, knot), size = Math.abs(high) < 10 ? 2 : 0, bar = 10 * wide / (p.w * p.mx);
  text(g, `${low.toFixed(size)} – ${high.toFixed(size)}`, wide - pad, pad, "right", ratio, "top");
  text(g, "10 mm", pad, tall - pad - 5 * ratio, "left", ratio, "bottom");
  g.fillStyle = "#fff"; g.fillRect(pad, tall - pad - 2 * ratio, bar, 2 * ratio);
};
const told = () => {
  if (meta.planes === 3) return planes.map((p, i) => `${p.name} ${at[i] + 1}/${p.n}`).join(" · ") + ` · ${dz} mm pixels`;
  const k = at[0], [start, end] = [first, meta.inside.lastIndexOf(true)], ends = meta.ends;
  const name = ends && k === start ? ends[0] : ends && k === end ? ends[1] : "";
  const from = ends && ends[1] === "base" ? end : start, where = Math.abs(meta.position_mm[k] - meta.position_mm[from]);
  return `slice ${meta.slices[k]} (${k + 1} of ${D})${name ? ` · most ${name === "base" ? "basal" : "apical"} with mask` : ""}`
    + ` · ${where.toFixed(1)} mm from the ${ends ? "basal end" : "first slice"} · spacing ${dz.toFixed(1)} mm`
    + (meta.inside[k] ? "" : " · outside the mask: not segmented");
};
let asked = 0;
const redraw = () => { cancelAnimationFrame(asked); asked = requestAnimationFrame(() => {
  panels.forEach(draw);
  $("#slice").max = planes[active].n - 1; $("#slice").value = at[active];
  $("#where").textContent = told();
  root.querySelectorAll("[data-level]").forEach(b => b.toggleAttribute("aria-current", +b.dataset.level === at[0]));
  root.querySelectorAll("[data-set]").forEach(b => { const [key, value] = b.dataset.set.split("=");
    b.setAttribute("aria-pressed", String(state[key]) === value || (!value && state[key] === true)); });
}); };
const step = by => { at[active] = Math.max(0, Math.min(planes[active].n - 1, at[active] + by)); redraw(); };
const set = (key, value) => { if (key === "seq" && value !== "all" && !images[value]) return;
  if (key === "reference" && !layer("reference")) return;
  state[key] = value || !state[key];
  if (key === "seq") layout(); else redraw(); };

const layout = () => {
  const shown = state.seq === "all" ? images : [images[state.seq]], stage = $(".stage");
  panels = (state.seq === "all" ? [planes[active]] : planes).flatMap(p => shown.map(image => ({p, image, canvas: make("canvas")})));
  stage.replaceChildren(...panels.map(panel => panel.canvas));
  const ratios = panels.map(({p}) => p.w * p.mx / (p.h * p.my));
  stage.style.gridTemplateColumns = ratios.map(r => `minmax(0, ${r}fr)`).join(" ");
  stage.style.maxWidth = `min(100%, calc(${ratios.reduce((a, b) => a + b)} * 66vh))`;
  panels.forEach(listen); redraw();
};
const listen = ({canvas, p, image}) => {
  let from = null, rolled = 0;
  canvas.style.aspectRatio = `${p.w * p.mx} / ${p.h * p.my}`;
  canvas.addEventListener("wheel", event => { event.preventDefault(); active = planes.indexOf(p);
    rolled += event.deltaY; if (Math.abs(rolled) >= 30) { step(Math.sign(rolled)); rolled = 0; } }, {passive: false});
  canvas.addEventListener("pointerdown", e => { active = planes.indexOf(p); canvas.setPointerCapture(e.pointerId);
    from = {x: e.clientX, y: e.clientY, ...windows[images.indexOf(image)], moved: false}; });
  canvas.addEventListener("pointermove", e => { if (!from) return;
    const x = e.clientX - from.x, y = e.clientY - from.y;
    from.moved ||= Math.hypot(x, y) > 3;
    if (from.moved) windows[images.indexOf(image)] = {c: from.c - y / 200 * from.w, w: from.w * Math.exp(x / 150)};
    redraw(); });
  canvas.addEventListener("pointerup", e => { if (from && !from.moved && meta.planes === 3) {
      const box = canvas.getBoundingClientRect(), x = Math.floor((e.clientX - box.left) / box.width * p.w);
      const y = Math.floor((e.clientY - box.top) / box.height * p.h);
      if (p === planes[0]) [at[2], at[1]] = [x, y]; else [at[p === planes[1] ? 2 : 1], at[0]] = [x, D - 1 - y];
    }
    from = null; redraw(); });
  canvas.addEventListener("dblclick", () => { windows[images.indexOf(image)] = {c: .5, w: 1}; redraw(); });
};
const levels = () => { const most = Math.max(1, ...meta.counts.map(c => c.reduce((a, b) => a + b, 0)));
  meta.counts.forEach((counts, k) => { const button = make("button"), bar = make("span");
    Object.assign(button, {type: "button", title: `slice ${meta.slices[k]}`}).dataset.level = k;
    bar.className = "bar";
    counts.forEach((n, t) => { const part = make("i"); part.style.width = `${100 * n / most}%`;
      part.style.background = meta.tissues[t].color; if (n) bar.append(part); });
    const end = meta.ends && (k === first ? meta.ends[0] : k === meta.inside.lastIndexOf(true) ? meta.ends[1] : "");
    button.append(`${meta.slices[k]}`, bar, end || "");
    button.addEventListener("click", () => { at[0] = k; redraw(); });
    $(".levels").append(button); }); };

const keys = {c: "overlay=contours", f: "overlay=fill", o: "overlay=off", m: "mask", u: "uncertainty", t: "reference",
  s: "seq=all", 1: "seq=0", 2: "seq=1", 3: "seq=2", 4: "seq=3"};
const typing = e => e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(e.target.tagName);
addEventListener("keydown", e => {
  if (typing(e)) return;
  const by = {ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1}[e.key];
  if (by) step(by); else if (e.key === " ") { hidden = true; redraw(); }
  else if (keys[e.key]) set(...keys[e.key].split("=")); else return;
  e.preventDefault();
});
addEventListener("keyup", e => { if (e.key === " ") { hidden = false; redraw(); if (!typing(e)) e.preventDefault(); } });
root.addEventListener("click", e => { const b = e.target.closest("[data-set]"); if (b) set(...b.dataset.set.split("=")); });
$("#slice").addEventListener("input", e => { at[active] = +e.target.value; redraw(); });
$("#opacity").addEventListener("input", e => { state.opacity = +e.target.value; redraw(); });
if (meta.planes === 1) levels();
addEventListener("resize", redraw);
root.hidden = false;
document.documentElement.classList.add("viewing");
layout();
})();

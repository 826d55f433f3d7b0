const table = document.getElementById("patients"), body = table.tBodies[0], rows = [...body.rows];
const head = [...table.tHead.rows[0].cells], filters = [...table.querySelectorAll("[data-k]")];
const search = document.getElementById("filter"), shown = document.getElementById("shown");
const more = document.getElementById("more"), words = new Map();
let ranked = rows, most = 150;
const value = (row, k) => { const cell = row.cells[k], text = cell.dataset.v ?? cell.textContent.trim();
  return head[k].classList.contains("n") ? (text === "" || text === "–" ? NaN : +text.replaceAll(",", "")) : text; };
const decisions = {accept: "accepted", redo: "redo", reject: "rejected"};
const entries = new Map();
rows.forEach(row => {
  const {r: result, written} = row.dataset;
  if (!result) return;
  const old = written ? JSON.parse(written) : null, entry = later(old, kept(result));
  const state = entry && decisions[entry.decision] || "unreviewed", cell = row.cells[row.cells.length - 1];
  if (entry) entries.set(row, {...entry, patient: row.cells[0].textContent.trim()});
  row.classList.add(state);
  cell.textContent = entry ? [decisions[entry.decision] || "note", entry.note].filter(Boolean).join(": ") : "";
  if (entry && entry.result !== result) cell.textContent += " (of an earlier result)";
  const link = row.querySelector("a"), picture = document.createElement("img");
  Object.assign(picture, {loading: "lazy", alt: "", width: 44, height: 44, src: link.getAttribute("href").replace(/_report\.html$/, "_thumb.png")});
  picture.onerror = () => picture.remove();
  row.cells[1].append(picture);
});
rows.forEach(row => words.set(row, row.textContent.toLowerCase()));
const state = {q: "", show: "", sort: ""};
const test = (text, v) => { const m = text.match(/^\s*(>=?|<=?|=)?\s*(-?[\d.]+)(?:\s*(?:-|to|–)\s*(-?[\d.]+))?\s*$/);
  if (!m) return true;
  if (m[3] !== undefined) return v >= +m[2] && v <= +m[3];
  return {">": v > +m[2], ">=": v >= +m[2], "<": v < +m[2], "<=": v <= +m[2]}[m[1]] ?? Math.abs(v - m[2]) < .05; };
const narrow = () => {
  const wanted = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const limits = filters.filter(f => f.value.trim()).map(f => [+f.dataset.k, f.value]);
  const fit = ranked.filter(row => (!state.show || row.classList.contains(state.show))
    && wanted.every(w => words.get(row).includes(w)) && limits.every(([c, text]) => test(text, value(row, c))));
  body.replaceChildren(...fit.slice(0, most));  // a thousand rows take long to lay out
  shown.textContent = `${fit.length} of ${rows.length}`;
  more.hidden = fit.length <= most;
  more.textContent = `Show all ${fit.length}`;
  document.querySelectorAll("[data-show]").forEach(b => { b.setAttribute("aria-pressed", b.dataset.show === state.show);
    const n = b.querySelector("b"); if (b.dataset.count !== undefined) n.textContent = rows.filter(r => r.classList.contains(b.dataset.show)).length; });
};
const sort = () => {
  const [k, down] = [parseInt(state.sort), state.sort.endsWith("d") ? -1 : 1];
  head.forEach((th, i) => i === k ? th.setAttribute("aria-sort", down > 0 ? "ascending" : "descending") : th.removeAttribute("aria-sort"));
  ranked = rows;
  if (!state.sort || !head[k]) return;
  const order = new Intl.Collator(undefined, {numeric: true}), numeric = head[k].classList.contains("n");
  const keyed = rows.map(row => [value(row, k), row]);
  const none = v => v === "" || Number.isNaN(v);
  keyed.sort(([a], [b]) => none(a) || none(b) ? none(a) - none(b) : down * (numeric ? a - b : order.compare(a, b)));
  ranked = keyed.map(([, row]) => row);
};
// The state stands in the address, so that Back and a saved link bring it back.
const put = () => {
  const told = new URLSearchParams(Object.entries(state).filter(([, v]) => v));
  filters.forEach(f => { if (f.value.trim()) told.set("f" + f.dataset.k, f.value.trim()); });
  history.replaceState(null, "", "#" + told);
};
const get = () => {
  const hash = location.hash.slice(1), told = new URLSearchParams(hash.includes("=") ? hash : {q: decodeURIComponent(hash)});
  for (const key in state) state[key] = told.get(key) || "";
  filters.forEach(f => { f.value = told.get("f" + f.dataset.k) || ""; });
  search.value = state.q;
  sort(); narrow();
};
const change = (...keys) => { Object.assign(state, ...keys); put(); narrow(); };
search.addEventListener("input", () => change({q: search.value}));
filters.forEach(f => f.addEventListener("input", () => change({})));
document.addEventListener("click", e => {
  const show = e.target.closest("[data-show]"), word = e.target.closest("[data-word]"), button = e.target.closest("thead button");
  if (show) change({show: state.show === show.dataset.show ? "" : show.dataset.show});
  if (word) { search.value = search.value === word.dataset.word ? "" : word.dataset.word; change({q: search.value}); }
  if (button) { const k = button.closest("th").cellIndex; state.sort = k + (state.sort === k + "a" ? "d" : "a"); put(); sort(); narrow(); }
});
document.getElementById("export").addEventListener("click", () => save([...entries.values()]));
document.getElementById("export").disabled = !entries.size;
more.addEventListener("click", () => { most = Infinity; narrow(); });
const marks = [...document.querySelectorAll(".strip[data-k]")];
body.addEventListener("mouseover", e => { const row = e.target.closest("tr");
  if (row) marks.forEach(strip => { const {k, low, high} = strip.dataset, v = value(row, +k), mark = strip.querySelector("circle");
    mark.style.display = Number.isNaN(v) ? "none" : "inline"; mark.setAttribute("cx", 4 + 192 * (v - low) / (high - low || 1)); }); });
addEventListener("hashchange", get);
get();

const panel = document.getElementById("review");
if (panel) {
const {patient, result} = panel.dataset, written = JSON.parse(panel.dataset.written);
let entry = later(written, kept(result));
const note = document.getElementById("note"), who = document.getElementById("who"), said = document.getElementById("said");
const words = {accept: "accepted", redo: "to be done again", reject: "rejected", "": "noted"};
const tell = () => {
  panel.querySelectorAll("button[data-decide]").forEach(b => b.setAttribute("aria-pressed", b.dataset.decide === entry?.decision));
  said.textContent = entry ? `processed, ${words[entry.decision]}` : "processed, not reviewed";
  said.className = `pill ${{accept: "ok", redo: "warned", reject: "failed"}[entry?.decision] || "unseen"}`;
  document.getElementById("when").textContent = entry
    ? [entry.reviewer, entry.date.slice(0, 16).replace("T", " "), entry.result === result ? "" : "of an earlier result"].filter(Boolean).join(" · ") : "";
};
const decide = decision => {
  entry = {patient, result, decision: decision ?? entry?.decision ?? "", note: note.value, reviewer: who.value, date: new Date().toISOString()};
  try { localStorage.setItem("deepgmm-reviewer", who.value); } catch { /* it is only not remembered */ }
  if (!keep(result, entry)) document.getElementById("when").textContent = "this browser keeps nothing: export it now";
  tell();
};
try { who.value = localStorage.getItem("deepgmm-reviewer") || ""; } catch { /* as above */ }
note.value = entry?.note ?? "";
panel.addEventListener("click", e => { const b = e.target.closest("[data-decide]"); if (b) decide(b.dataset.decide); });
for (const field of [note, who]) field.addEventListener("change", () => { if (entry || note.value) decide(); });
note.addEventListener("keydown", e => { if (e.key === "Enter" || e.key === "Escape") note.blur(); });
document.getElementById("export").addEventListener("click", () => { if (entry) save([entry]); });
addEventListener("keydown", e => {
  if (e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(e.target.tagName)) return;
  const decision = {a: "accept", r: "redo", x: "reject"}[e.key], link = {j: "next", k: "previous"}[e.key];
  if (decision) decide(decision); else if (e.key === "n") { note.focus(); e.preventDefault(); }
  else if (link) document.getElementById(link)?.click();
});
panel.hidden = false;
tell();
}

// Decisions, kept in this browser under the result they were made of, and exported as review.tsv.
const kept = result => { try { return JSON.parse(localStorage.getItem("deepgmm-review:" + result)) || null; } catch { return null; } };
const keep = (result, entry) => { try { localStorage.setItem("deepgmm-review:" + result, JSON.stringify(entry)); return true; } catch { return false; } };
const columns = ["patient", "decision", "note", "reviewer", "date", "result"];
const later = (a, b) => !a || (b && b.date > a.date) ? b : a;
const save = entries => {
  const lines = [columns, ...entries.map(e => columns.map(c => String(e[c] ?? "").replace(/[\t\r\n]+/g, " ")))];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.map(l => l.join("\t") + "\n").join("")], {type: "text/tab-separated-values"}));
  link.download = "review.tsv";
  link.click();
};

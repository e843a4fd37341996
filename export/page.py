"""The web page of `glit serve`: drop an image on it to see the most probable classes. Loads no other resources."""

from __future__ import annotations

__all__ = ["PAGE", "POLICY"]

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>glit serve</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 40rem; margin: 2rem auto; padding: 0 1rem }
  label { display: block; border: 2px dashed #888; border-radius: .5rem; padding: 3rem 1rem; text-align: center }
  label.over { border-color: #06c }
  img { max-width: 100%; max-height: 20rem; display: block; margin: 1rem auto }
  td { padding: .1rem .8rem } td:last-child { text-align: right }
</style>
<h1>Classify an image</h1>
<p>Model: <select id="model" aria-label="Model"></select></p>
<label id="target">Drop an image here, or choose one<br><input id="file" type="file" accept="image/*"></label>
<img id="image" alt="" hidden>
<p id="state" role="status"></p>
<table id="answer"></table>
<script>
  const at = id => document.getElementById(id);
  let last = null, asked = 0;
  async function classify(file) {
    if (!file) return;
    const number = ++asked;
    last = file;
    if (at("image").src) URL.revokeObjectURL(at("image").src);
    at("image").src = URL.createObjectURL(file);
    at("image").hidden = false;
    at("answer").replaceChildren();
    at("state").textContent = "...";
    let text = "", rows = [];
    try {
      const model = at("model").value; /* empty until the names have come */
      const where = model ? "classify?model=" + encodeURIComponent(model) : "classify";
      const response = await fetch(where, { method: "POST", body: file });
      const found = await response.json();
      if (response.ok) rows = found; else text = found.error;
    } catch (error) { text = "The server did not answer: " + error.message; }
    if (number !== asked) return;
    at("state").textContent = text;
    for (const row of rows) {
      const line = at("answer").insertRow();
      line.insertCell().textContent = row.class;
      line.insertCell().textContent = (100 * row.probability).toFixed(2) + " %";
    }
  }
  fetch("models").then(response => response.json()).then(names => {
    for (const name of names) at("model").add(new Option(name));
  }).catch(() => { at("state").textContent = "The server did not answer."; });
  at("file").onchange = event => classify(event.target.files[0]);
  at("model").onchange = () => classify(last);
  for (const kind of ["dragover", "dragleave", "drop"]) document.addEventListener(kind, event => {
    event.preventDefault();
    at("target").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) {
      at("file").files = event.dataTransfer.files; /* so that the name of the file is shown */
      classify(event.dataTransfer.files[0]);
    }
  });
</script>
</html>
"""

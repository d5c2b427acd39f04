"use strict";
const at = (id) => document.getElementById(id);
let asked = 0;

function say(text, wrong = false) {
  at("state").textContent = text;
  at("state").className = wrong ? "wrong" : "";
}

function row(area) {
  const line = document.createElement("tr");
  for (const text of [area.class, area.pixels, `${area.percent.toFixed(2)} %`]) {
    line.insertCell().textContent = text;
  }
  const square = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const fill = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  for (const [key, value] of [["width", "100%"], ["height", "100%"], ["fill", area.colour]]) fill.setAttribute(key, value);
  square.append(fill);
  line.cells[0].prepend(square);
  return line;
}

async function segment(file) {
  const mine = ++asked; // an answer to an earlier image comes too late
  at("found").hidden = true;
  say(`${file.name}: at work …`);
  try {
    const answer = await fetch("/segment", { method: "POST", body: file });
    const found = await answer.json();
    if (mine !== asked) return;
    if (!answer.ok) return say(`${file.name}: ${found.error}`, true);
    at("image").src = found.image;
    at("overlay").src = found.overlay;
    at("pictures").classList.toggle("small", found.width < 320);
    at("mask").src = at("save").href = found.mask;
    at("areas").replaceChildren(...found.areas.filter((a) => a.pixels).sort((a, b) => b.pixels - a.pixels).map(row));
    at("found").hidden = false;
    say(`${file.name}: ${found.width} × ${found.height} pixels`);
  } catch (error) {
    if (mine === asked) say(`${file.name}: no answer (${error.message}). Is the command that serves this page still running?`, true);
  }
}

async function tell() {
  const about = await (await fetch("/about")).json();
  const facts = [["run", about.run], ["trained on", about.trained_on], ["steps", about.steps], ["supervision", about.supervision],
    ["classes", about.classes.join(", ")], ...about.scores.map(([data, miou]) => [`mIoU on ${data}`, miou])];
  for (const [name, value] of facts) {
    for (const [kind, text] of [["dt", name], ["dd", value]]) {
      at("about").appendChild(document.createElement(kind)).textContent = text;
    }
  }
}

tell().catch((error) => say(`nothing is known of the run (${error.message})`, true));
at("file").addEventListener("change", () => at("file").files.length && segment(at("file").files[0]));
at("kind").addEventListener("change", () => {
  at("overlay").hidden = at("kind").checked;
  at("mask").hidden = !at("kind").checked;
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  at("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) segment(event.dataTransfer.files[0]);
  });
}

for (const kind of ["dragover", "drop"]) {  // an image dropped beside the field must not leave the page
  window.addEventListener(kind, (event) => event.preventDefault());
}

"use strict";
for (const section of document.querySelectorAll("section.samples")) {
  const form = section.querySelector("form");
  const status = section.querySelector("[role=status]");
  const cards = [...section.querySelectorAll("li.sample")];
  const apply = () => {
    const name = form.elements.class.value;
    const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const lacking = form.elements.missing.checked;
    let shown = 0;
    for (const card of cards) {
      const names = JSON.parse(lacking ? card.dataset.missing : card.dataset.classes);
      const fits = (name ? names.includes(name) : !lacking || names.length > 0) &&
        words.every((word) => card.dataset.text.includes(word));
      card.hidden = !fits;
      shown += fits;
    }
    status.textContent = `${shown} of ${cards.length} samples shown`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  form.hidden = false;
  apply();
}

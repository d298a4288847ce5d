// Keys, a guard against voting twice, and a button that copies the judge's link. The page works without it.
"use strict";

const DEAF_MS = 300; // after loading: a second press or click was meant for the page before
const STUCK_MS = 5000; // after sending: the visitor may have stopped it

const loaded = performance.now();
const announced = document.querySelector("[role=status]");
let isSent = false;

const isEarly = () => performance.now() - loaded < DEAF_MS;

document.addEventListener("submit", (event) => {
  if (isSent || (isEarly() && document.querySelector("[data-key]"))) {
    event.preventDefault();
    return;
  }
  isSent = true;
  if (announced) announced.textContent = "Sending";
  setTimeout(() => { isSent = false; }, STUCK_MS);
});

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.isComposing || event.ctrlKey || event.altKey || event.metaKey || isEarly()) return;
  if (event.target.closest("input, textarea, select, [contenteditable]")) return;
  // on some keyboards a digit needs Shift: then its place counts
  const key = /^Digit[1-4]$/.test(event.code) ? event.code.at(-1) : event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const button = [...document.querySelectorAll("[data-key]")].find((b) => b.dataset.key.split(" ").includes(key));
  if (!button) return;
  event.preventDefault();
  button.form.requestSubmit(button);
});

for (const button of document.querySelectorAll("[data-copies]")) {
  const field = document.getElementById(button.dataset.copies);
  field.value = location.origin + location.pathname; // a server behind a proxy may not know its own name
  button.hidden = false;
  field.addEventListener("focus", () => field.select());
  button.addEventListener("click", async () => {
    field.select();
    try {
      await navigator.clipboard.writeText(field.value);
      button.textContent = "Copied";
    } catch { // not there without https, or not allowed
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    }
  });
}

// a page that the browser kept is older than the votes
window.addEventListener("pageshow", (event) => { if (event.persisted) window.location.reload(); });

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

// Keys that vote: a judge can switch them off, for good in this browser, and where there is no keyboard they are off.
const KEYS_OFF = "judging-keys-off";
const hasKeyboard = !matchMedia("(hover: none) and (pointer: coarse)").matches;
const keysSwitch = document.getElementById("keys");
let keysAct = false;

function setKeys(on) {
  keysAct = on;
  document.documentElement.classList.toggle("no-keys", !on);
  for (const button of document.querySelectorAll("[data-key]")) {
    if (on) button.setAttribute("aria-keyshortcuts", button.dataset.key);
    else button.removeAttribute("aria-keyshortcuts");
  }
}

if (keysSwitch && hasKeyboard) {
  try { keysSwitch.checked = localStorage.getItem(KEYS_OFF) === null; } catch { /* nothing may be kept: as the page comes */ }
  keysSwitch.parentElement.hidden = false;
  // a mouse leaves the focus where it clicked, and keys would be deaf from then on
  document.addEventListener("click", (event) => {
    if (event.pointerType === "mouse" && event.target.closest("summary, .switch")) document.activeElement.blur();
  });
  keysSwitch.addEventListener("change", () => {
    setKeys(keysSwitch.checked);
    try {
      if (keysSwitch.checked) localStorage.removeItem(KEYS_OFF);
      else localStorage.setItem(KEYS_OFF, "yes");
    } catch { /* then it holds for this page */ }
  });
}
setKeys(hasKeyboard && keysSwitch !== null && keysSwitch.checked);

function keyOf(event) {
  if (event.repeat || event.isComposing || event.keyCode === 229) return null; // held down, or an input method at work
  if (event.ctrlKey || event.altKey || event.metaKey || event.getModifierState("AltGraph")) return null;
  // on some keyboards a digit needs Shift; elsewhere Shift makes it another command
  if (event.shiftKey) return /^[1-4]$/.test(event.key) ? event.key : null;
  if (/^Digit[1-4]$/.test(event.code)) return event.code.at(-1);
  return event.key.length === 1 ? event.key.toLowerCase() : event.key;
}

document.addEventListener("keydown", (event) => {
  if (!keysAct || event.defaultPrevented || isEarly()) return;
  // whoever has gone to a control works that one; a screen reader that hands keys on has its focus there too
  if (event.target.closest?.("a, button, input, textarea, select, summary, [contenteditable]")) return;
  const key = keyOf(event);
  const button = key && [...document.querySelectorAll("[data-key]")].find((b) => b.dataset.key.split(" ").includes(key));
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

// Keys, a guard against voting twice, votes that outlive a lost connection, a prompt that stays in sight, and a button
// that copies the judge's link. The page works without it.
"use strict";

const DEAF_MS = 300; // after loading: a second press or click was meant for the page before
const STUCK_MS = 5000; // after sending: the visitor may have stopped it
const ANSWER_MS = 15_000; // a connection that is silent so long is lost
const RETRY_MS = 3000;

const loaded = performance.now();
const announced = document.querySelector("[role=status]");
const bar = document.querySelector("form.bar");
let isSent = false;

const isEarly = () => performance.now() - loaded < DEAF_MS;

// What this browser keeps; where nothing may be kept, it is gone with the page.
function recall(name) {
  try { return localStorage.getItem(name); } catch { return null; }
}

function keep(name, value) {
  try {
    if (value === null) localStorage.removeItem(name);
    else localStorage.setItem(name, value);
  } catch { /* then it holds for this page */ }
}

function show(words) {
  announced.classList.remove("spoken");
  announced.textContent = words;
}

document.addEventListener("submit", (event) => {
  if (isSent || (isEarly() && document.querySelector("[data-key]"))) {
    event.preventDefault();
    return;
  }
  isSent = true;
  if (announced) announced.textContent = "Sending";
  if (event.target === bar) {
    const vote = new URLSearchParams(new FormData(bar));
    vote.set("choice", event.submitter.value);
    event.preventDefault();
    sendVote(vote.toString());
  } else {
    setTimeout(() => { isSent = false; }, STUCK_MS);
  }
});

// A vote that does not arrive is kept, also when the page is closed, and sent once there is a connection: the server
// counts it once, however often it comes.
const KEPT = "judging-vote-kept";
const LATE = "judging-vote-late";

async function sendVote(vote, wasLost = false) {
  const choice = new URLSearchParams(vote).get("choice");
  const said = bar.querySelector(`[value=${choice}] > span`).innerText;
  let answer;
  try {
    answer = await fetch(bar.action, {
      method: "POST", body: new URLSearchParams(vote), redirect: "manual", signal: AbortSignal.timeout?.(ANSWER_MS),
    });
    if (answer.status >= 500) throw new Error(answer.status);
  } catch {
    keep(KEPT, vote);
    show(`No connection. Your vote “${said}” is kept here, and sent as soon as there is one.`);
    setTimeout(sendVote, RETRY_MS, vote, true);
    return;
  }
  keep(KEPT, null);
  if (answer.type === "opaqueredirect") { // stored
    if (wasLost) keep(LATE, said);
    location.assign(location.pathname);
  } else { // the page that says why not
    const field = document.createElement("input");
    field.type = "hidden";
    [field.name, field.value] = ["choice", choice];
    bar.append(field);
    bar.submit();
  }
}

if (bar) {
  const kept = recall(KEPT);
  const late = recall(LATE);
  keep(LATE, null);
  if (kept && new URLSearchParams(kept).get("impression") === bar.elements.impression.value) {
    isSent = true;
    sendVote(kept, true);
  } else if (late) {
    setTimeout(show, DEAF_MS, `The connection is back: your vote “${late}” on the pair before was sent.`);
  }
}

// On a phone the prompt stays in sight, and each text's label below it.
const prompt = document.querySelector(".prompt");
if (prompt) {
  prompt.classList.add("sticks");
  new ResizeObserver(() => {
    const height = getComputedStyle(prompt).position === "sticky" ? prompt.offsetHeight : 0;
    document.documentElement.style.setProperty("--prompt-height", `${height}px`);
    if (height && prompt.scrollHeight > prompt.clientHeight) prompt.tabIndex = 0; // arrows then scroll it
    else prompt.removeAttribute("tabindex");
  }).observe(prompt);
}

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
  keysSwitch.checked = recall(KEYS_OFF) === null;
  keysSwitch.parentElement.hidden = false;
  // a mouse leaves focus and caret where it clicked, and keys would be deaf from then on
  document.addEventListener("click", (event) => {
    if (event.pointerType !== "mouse") return;
    if (event.target.closest("summary, label")) document.activeElement.blur();
    if (getSelection().type === "Caret") getSelection().removeAllRanges();
  });
  keysSwitch.addEventListener("change", () => {
    setKeys(keysSwitch.checked);
    keep(KEYS_OFF, keysSwitch.checked ? null : "yes");
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
  if (event.target.closest?.("a, button, input, textarea, select, summary, [contenteditable], [tabindex='0']")) return;
  // a caret in the text, which no mouse left there, is a reader's: caret browsing, or a screen reader's browse mode
  if (getSelection().type === "Caret") return;
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

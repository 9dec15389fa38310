"use strict";
// What the pages of a server share. Each has its own TEXTS by language, and `root`, the address of the server.
const byId = (id) => document.getElementById(id);
let language = localStorage.getItem("ft-language") || (navigator.language.startsWith("ja") ? "ja" : "en");

function filled(template, values) { return template.replace(/\{(\w+)\}/g, (_, name) => values[name]); }
function text(name, values) { return values ? filled(TEXTS[language][name], values) : TEXTS[language][name]; }
function element(tag, className, content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (content !== undefined && content !== null) made.textContent = content;
  return made;
}
function showTexts() {
  document.documentElement.lang = language;
  byId("language").value = language;
  for (const one of document.querySelectorAll("[data-text]")) one.textContent = text(one.dataset.text);
}
/** Call `show` when another language is chosen. */
function onLanguage(show) {
  byId("language").addEventListener("change", () => {
    language = byId("language").value;
    localStorage.setItem("ft-language", language);
    show();
  });
}

// Pages of the class `app`: they show a problem below their bar, and ask for a key in a dialog.
function showProblem(message) {
  byId("problem").textContent = message;
  byId("problem").hidden = !message;
}
function keyHeaders() {
  const key = sessionStorage.getItem("ft-key");
  return key ? { authorization: "Bearer " + key } : {};
}
async function callServer(path, options = {}) {
  const response = await fetch(root + path, { ...options, headers: { ...options.headers, ...keyHeaders() } });
  if (response.status === 401) throw Object.assign(new Error("401"), { needsKey: true });
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message || response.status + " " + response.statusText);
  }
  return response;
}
/** Show why something failed; without a key that the server accepts, ask for one. */
function showFailure(error) {
  if (error.needsKey) askForKey();
  else showProblem(error instanceof TypeError ? text("unreachable") : error.message);
}
function askForKey() {
  showProblem(sessionStorage.getItem("ft-key") ? text("key_wrong") : "");
  byId("key").value = "";
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}
/** Call `use` when a key was given. */
function onKey(use) {
  byId("key-form").addEventListener("submit", () => {
    sessionStorage.setItem("ft-key", byId("key").value.trim());
    showProblem("");
    use();
  });
}

// What the local pages share on which people judge pictures. A page defines `update`, which shows how it stands.
"use strict";
const find = (selector) => document.querySelector(selector);
let busy = false;

async function ask(method, path, body) {
  const options = { method };
  if (body) Object.assign(options, { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
  const answer = await fetch(path, options);
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(typeof said.detail === "string" ? said.detail : "It did not work (" + answer.status + ").");
  return said;
}

// One request at a time: a key that is held down must not do its work twice.
async function once(work) {
  if (busy) return;
  busy = true;
  try {
    await work();
    complain("");
  } catch (error) {
    complain(error instanceof TypeError ? "The server does not answer; nothing is lost, try again." : error.message);
  } finally {
    busy = false;
    update();
  }
}

function complain(what) {
  find(".wrong").textContent = what;
  find(".wrong").hidden = !what;
}

// Shows the start: names to choose from where the server has some, else a field for one's own; `begin` gets the name.
async function askForName(path, begin) {
  const names = await ask("GET", path);
  find("#enter").hidden = names.length > 0;
  find("#choose").hidden = names.length === 0;
  find("#enter").addEventListener("submit", (event) => { event.preventDefault(); begin(find("#name").value.trim()); });
  for (const name of names) {
    const button = document.createElement("button");
    button.textContent = name;
    button.addEventListener("click", () => begin(name));
    find(".names").append(button);
  }
  find("#start").hidden = false;
  find(names.length > 0 ? ".names button" : "#name").focus();
}

function showProgress(name, done, total) {
  find("#start").hidden = true;
  find("#progress").hidden = false;
  find("#count").textContent = done + " of " + total;
  find(".track span").style.width = (100 * done / total) + "%";
  find("#who").textContent = name;
}

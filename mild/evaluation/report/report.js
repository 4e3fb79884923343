"use strict";

/* Calls `load` once for each element when it comes near to what is seen: pictures are decoded no sooner. */
function whenNear(elements, load) {
  const watch = new IntersectionObserver((seen) => {
    for (const { isIntersecting, target } of seen) {
      if (isIntersecting) {
        watch.unobserve(target);
        load(target);
      }
    }
  }, { rootMargin: "500px" });
  elements.forEach((element) => watch.observe(element));
}

const tools = document.getElementById("tools");
const cases = [...document.querySelectorAll(".case")];
const loaded = new WeakSet();

function tile(card, name) {
  return card.querySelector(`.tile[data-name="${CSS.escape(name)}"]`);
}

function scoreOf(card, method, metric) {
  return card.querySelector(`.values tr[data-name="${CSS.escape(method)}"] td[data-metric="${CSS.escape(metric)}"]`);
}

/* Gives an image what the view asks for of a tile's: the picture, or its difference where it has one. */
function render(image, source) {
  const view = tools.elements.view.value;
  const difference = view === "picture" ? "" : source.dataset.difference || "";
  image.src = difference || source.dataset.source;
  image.classList.toggle("enhanced", Boolean(difference) && view === "enhanced");
  return Boolean(difference);
}

/* A card's pictures, two of them on its stage. */
function show(card) {
  if (!loaded.has(card)) return;
  const choice = (side) => card.querySelector(`.${side}-choice`).value;
  const differs = [...card.querySelectorAll(".tile img")].map((image) => render(image, image)).includes(true);
  for (const side of ["left", "right"]) {
    const picked = tile(card, choice(side));
    const image = card.querySelector(`.picture .${side}`);
    const difference = render(image, picked.querySelector("img"));
    image.alt = (difference ? "Difference: " : "") + picked.querySelector("img").alt;
    card.querySelector(`.${side}-tag`).textContent = picked.querySelector("span").textContent;
  }
  card.querySelector(".explain").hidden = !differs;
  card.querySelector(".gain").hidden = tools.elements.view.value !== "enhanced";
  for (const button of card.querySelectorAll("button.tile")) {
    button.setAttribute("aria-pressed", String(button.dataset.name === choice("right")));
  }
}

function slide(card, percent) {
  card.querySelector("input[type=range]").value = percent;
  card.querySelector(".picture").style.setProperty("--at", `${percent}%`);
}

function choose(card, method) {
  if (tile(card, method)?.matches("button")) card.querySelector(".right-choice").value = method;
}

/* The order, what is hidden, and the value under each picture. */
function arrange() {
  const { order, metric, method, dataset } = tools.elements;
  const shown = new Set(new FormData(tools).getAll("shown"));
  const larger = metric?.selectedOptions[0].dataset.larger === "1";
  const rank = (card) => {
    const value = order.value && metric ? scoreOf(card, method.value, metric.value)?.dataset.value : "";
    if (!value) return Infinity;
    return (order.value === "best") === larger ? -Number(value) : Number(value);
  };
  const sorted = cases.map((card) => [rank(card), Number(card.dataset.index), card]);
  // Infinity minus itself is no number; those without a value come last.
  sorted.sort((a, b) => (a[0] === b[0] ? a[1] - b[1] : a[0] < b[0] ? -1 : 1));
  document.getElementById("cases").append(...sorted.map(([, , card]) => card));
  for (const card of cases) {
    card.hidden = Boolean(dataset.value) && card.dataset.dataset !== dataset.value;
    for (const element of card.querySelectorAll('.tile[data-name^="method:"], .values tr[data-name]')) {
      element.hidden = !shown.has(element.dataset.name);
    }
    for (const element of card.querySelectorAll('.tile[data-name^="method:"]')) {
      const score = metric && scoreOf(card, element.dataset.name, metric.value);
      element.querySelector("small").textContent = score ? score.textContent : "";
    }
  }
  const count = cases.filter((card) => !card.hidden).length;
  tools.querySelector("output").textContent = `${count} of ${cases.length} shown`;
}

if (tools) {
  for (const card of cases) {
    const picture = card.querySelector(".picture");
    const range = card.querySelector("input[type=range]");
    const lastTile = [...card.querySelectorAll("button.tile")].at(-1);
    card.querySelector(".right-choice").value = lastTile.dataset.name;
    choose(card, tools.elements.method.value);
    range.addEventListener("input", () => slide(card, range.value));
    const follow = (event) => {
      const box = picture.getBoundingClientRect();
      slide(card, Math.round(Math.min(100, Math.max(0, (100 * (event.clientX - box.left)) / box.width))));
    };
    picture.addEventListener("pointerdown", (event) => {
      picture.setPointerCapture(event.pointerId);
      follow(event);
    });
    picture.addEventListener("pointermove", (event) => {
      if (picture.hasPointerCapture(event.pointerId)) follow(event);
    });
    card.addEventListener("change", () => show(card));
    for (const button of card.querySelectorAll("button.tile")) {
      button.addEventListener("click", () => {
        card.querySelector(".right-choice").value = button.dataset.name;
        show(card);
      });
    }
  }
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.addEventListener("change", (event) => {
    if (event.target.name === "method") cases.forEach((card) => choose(card, event.target.value));
    arrange();
    cases.forEach(show);
  });
  arrange();
  whenNear(cases, (card) => {
    loaded.add(card);
    show(card);
  });
}

/* The pixels of an embedded picture: red, green, blue, alpha, and so on. */
async function pixels(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

/* Eq. 2: the background, overlaid by layers from back to front. */
function compose(background, layers) {
  const colours = Float32Array.from(background.data);
  for (const { data } of layers) {
    for (let at = 0; at < data.length; at += 4) {
      const alpha = data[at + 3] / 255;
      if (!alpha) continue;
      for (let channel = at; channel < at + 3; channel++) {
        colours[channel] += alpha * (data[channel] - colours[channel]);
      }
    }
  }
  return new ImageData(Uint8ClampedArray.from(colours), background.width, background.height);
}

whenNear(document.querySelectorAll(".layered"), async (card) => {
  const canvas = card.querySelector("canvas");
  const boxes = [...card.querySelectorAll("[data-layer]")];
  const before = card.querySelector("details img");
  before.src = before.dataset.source;
  const [background, ...layers] = await Promise.all(
    [canvas.dataset.background, ...boxes.map((box) => box.dataset.layer)].map(pixels),
  );
  canvas.width = background.width;
  canvas.height = background.height;
  const order = card.dataset.order.split(" ").filter(Boolean).map(Number);
  const draw = () => {
    const present = order.filter((index) => boxes[index].checked);
    canvas.getContext("2d").putImageData(compose(background, present.map((index) => layers[index])), 0, 0);
    const names = present.map((index) => index + 1).sort((a, b) => a - b);
    const who = names.length ? `with person ${names.join(", ")}` : "without anybody";
    canvas.setAttribute("aria-label", `${canvas.dataset.key}: background ${who}`);
  };
  const all = (on) => () => {
    boxes.forEach((box) => { box.checked = on; });
    draw();
  };
  card.addEventListener("change", draw);
  card.querySelector(".all").addEventListener("click", all(true));
  card.querySelector(".none").addEventListener("click", all(false));
  draw();
});

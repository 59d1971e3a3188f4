"use strict";
// The page is readable without this script; it adds filters, enlarging, the map and the CSV of fixes.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// ---------------------------------------------------------------------------- pictures
const gallery = document.querySelector("#gallery");
if (gallery) {
  const cards = all(".card", gallery);
  const count = document.querySelector("#gallery-count");
  const note = document.querySelector("#gallery-note");
  const state = { name: null, label: "", predicted: "", sort: "gallery" };
  const position = (card) => {
    const entry = card.dataset.galleries.split(" ").find((one) => one.startsWith(state.name + ":"));
    return entry === undefined ? null : Number(entry.split(":")[1]);
  };
  const sortKey = {
    gallery: (card) => position(card) ?? Number(card.dataset.order),
    probability: (card) => Number(card.dataset.probability),
    loss: (card) => -Number(card.dataset.loss),
    uncertain: (card) => Number(card.dataset.margin),
  };
  const show = () => {
    const visible = cards.filter((card) => {
      const labels = JSON.parse(card.dataset.label), predicted = JSON.parse(card.dataset.predicted);
      return (state.predicted || position(card) !== null)
        && (!state.label || labels.includes(state.label))
        && (!state.predicted || (predicted.includes(state.predicted) && card.dataset.wrong === "1"));
    });
    const key = sortKey[state.sort];
    if (state.sort === "path") visible.sort((a, b) => (a.dataset.path < b.dataset.path ? -1 : 1));
    else visible.sort((a, b) => key(a) - key(b));
    for (const card of cards) card.hidden = true;
    for (const card of visible) { card.hidden = false; gallery.append(card); }
    count.textContent = visible.length === 1 ? "1 picture" : `${visible.length} pictures`;
    const pair = state.predicted ? `Shown: images of ${state.label} that are predicted as ${state.predicted}. ` : "";
    note.textContent = pair || document.querySelector(`[data-gallery="${state.name}"]`).dataset.note;
  };
  const choose = (name) => {
    state.name = name;
    state.predicted = "";
    for (const tab of all("[data-gallery]")) tab.setAttribute("aria-pressed", tab.dataset.gallery === name);
    show();
  };
  for (const tab of all("[data-gallery]")) tab.addEventListener("click", () => choose(tab.dataset.gallery));
  const classFilter = document.querySelector("#gallery-class");
  classFilter.addEventListener("change", () => { state.label = classFilter.value; state.predicted = ""; show(); });
  const sort = document.querySelector("#gallery-sort");
  sort.addEventListener("change", () => { state.sort = sort.value; show(); });
  for (const cell of all("button[data-pair]")) {
    cell.addEventListener("click", () => {
      [state.label, state.predicted] = JSON.parse(cell.dataset.pair);
      classFilter.value = state.label;
      for (const tab of all("[data-gallery]")) tab.setAttribute("aria-pressed", "false");
      show();
      document.querySelector("#pictures").scrollIntoView();
      document.querySelector("#pictures h2").focus();
    });
  }
  choose(document.querySelector("[data-gallery]").dataset.gallery);
}
// ---------------------------------------------------------------------------- slices
const sliceCards = document.querySelector("#slice-cards");
if (sliceCards) {
  const cards = all(".card", sliceCards), buttons = all("[data-slice]");
  const showSlice = (button) => {
    const positions = new Map();
    for (const card of cards) {
      const entry = card.dataset.slices.split(" ").find((one) => one.startsWith(button.dataset.slice + ":"));
      card.hidden = entry === undefined;
      if (entry !== undefined) positions.set(card, Number(entry.split(":")[1]));
    }
    for (const [card] of [...positions].sort((a, b) => a[1] - b[1])) sliceCards.append(card);
    for (const one of buttons) one.setAttribute("aria-pressed", one === button);
    document.querySelector("#slice-title").textContent = button.dataset.title;
    document.querySelector("#slice-count").textContent = button.dataset.count;
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      showSlice(button);
      document.querySelector("#slice-title").focus({ preventScroll: true });
      sliceCards.querySelector(".card:not([hidden])").scrollIntoView({ block: "nearest" });
    });
  }
  showSlice(buttons[0]);
}
for (const toggle of all("[data-heat-toggle]")) {
  toggle.addEventListener("click", () => {
    const on = toggle.getAttribute("aria-pressed") !== "true";
    document.body.classList.toggle("heat-on", on);
    for (const one of all("[data-heat-toggle]")) one.setAttribute("aria-pressed", on);
  });
}

// ---------------------------------------------------------------------------- enlarging
const dialog = document.querySelector("#enlarged");
let shown = null;
const neighbors = () => all(".card:not([hidden]) .open", shown.closest(".cards"));
const enlarge = (button) => {
  shown = button;
  const stage = dialog.querySelector(".stage"), frame = button.querySelector(".frame");
  stage.replaceChildren(frame ? frame.cloneNode(true) : document.createTextNode("The original cannot be read."));
  dialog.querySelector(".words").textContent = button.closest(".card").querySelector(".text").innerText;
  dialog.querySelector(".full-path").textContent = button.dataset.path;
  if (!dialog.open) dialog.showModal();
};
const step = (by) => {
  const buttons = neighbors();
  const next = buttons[buttons.indexOf(shown) + by];
  if (next) enlarge(next);
};
for (const button of all(".card .open")) button.addEventListener("click", () => enlarge(button));
dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
dialog.querySelector("[data-previous]").addEventListener("click", () => step(-1));
dialog.querySelector("[data-next]").addEventListener("click", () => step(1));
dialog.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => { if (shown) shown.focus(); });

// ---------------------------------------------------------------------------- fixes of labels
const download = document.querySelector("#download-fixes");
if (download) {
  // As arrowhead.spreadsheet: text that a spreadsheet would run as a formula gets a leading '.
  const cell = (text) => {
    const safe = /^[=+\-@']/.test(text.trimStart().slice(0, 1).normalize("NFKC")) ? `'${text}` : text;
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const ticked = () => all("[data-fix]").filter((card) => card.querySelector("[type=checkbox]").checked);
  const status = document.querySelector("#fixes-status");
  const refresh = () => {
    const count = ticked().length;
    status.textContent = count === 1 ? "1 label ticked" : `${count} labels ticked`;
    download.disabled = count === 0;
  };
  for (const box of all("[data-fix] [type=checkbox]")) box.addEventListener("change", refresh);
  for (const input of all("[data-fix] [type=text]")) {
    input.addEventListener("input", () => { input.closest("[data-fix]").querySelector("[type=checkbox]").checked = true; refresh(); });
  }
  download.addEventListener("click", () => {
    const rows = ticked().map((card) => {
      const { path, label, suggested, score } = card.dataset;
      return [path, label, suggested, score, card.querySelector("[type=text]").value].map(cell).join(",");
    });
    const text = ["path,label,suggested,score,new_label", ...rows].join("\r\n") + "\r\n";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = "fixes.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  refresh();
}

// ---------------------------------------------------------------------------- the map
const map = document.querySelector("#map");
if (map) {
  const data = JSON.parse(document.querySelector("#map-data").textContent);
  const svg = map.querySelector("svg"), tip = map.querySelector(".tip");
  const circles = data.points.map((point) => {
    const circle = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    circle.setAttribute("cx", point.x);
    circle.setAttribute("cy", point.y);
    circle.setAttribute("r", point.wrong ? 7 : 5);
    if (point.wrong) circle.classList.add("wrong");
    circle.addEventListener("pointerenter", () => hover(point));
    circle.addEventListener("pointerleave", () => { tip.hidden = true; });
    svg.append(circle);
    return circle;
  });
  const hover = (point) => {
    const tile = tip.querySelector(".tile");
    tile.hidden = point.tile === null;
    if (point.tile !== null) {
      const column = point.tile % data.columns, row = Math.floor(point.tile / data.columns);
      tile.style.cssText = `width:${data.side}px;height:${data.side}px;background-image:url("${data.sheet}");`
        + `background-position:-${column * data.side}px -${row * data.side}px`;
    }
    tip.querySelector(".words").textContent = `${point.path} – label ${point.label}, predicted ${point.predicted}`;
    tip.hidden = false;
    const scale = svg.clientWidth / data.width;
    const left = Math.min(point.x * scale + 12, map.clientWidth - tip.offsetWidth - 4);
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${Math.max(0, point.y * scale - tip.offsetHeight - 12)}px`;
  };
  const color = (by) => {
    data.points.forEach((point, k) => circles[k].setAttribute("fill", data.colors[point[by]] ?? data.other));
    for (const button of all("[data-color-by]")) button.setAttribute("aria-pressed", button.dataset.colorBy === by);
  };
  for (const button of all("[data-color-by]")) button.addEventListener("click", () => color(button.dataset.colorBy));
  color("label");
}

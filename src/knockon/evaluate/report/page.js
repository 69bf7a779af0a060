"use strict";
// The page: theme, tables, and which condition is looked at. Plots are in plots.js.

const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const state = { metric: data.favorite, model: null, condition: null, map: "effect", double: "sum", all: false };
const metricOf = (name) => data.metrics.find((metric) => metric.name === name);
const modelOf = (name) => data.models.find((model) => model.name === name);

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

/** Three digits, as in the tables of the page. */
function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "";
  const size = Math.abs(value);
  const text = Number.isInteger(value) || size >= 1000 ? Math.round(value).toLocaleString("en") : size < 1e-4 ? value.toExponential(1) : value.toPrecision(3);
  return text.replaceAll("-", "\u2212");
}

// ---- theme -----------------------------------------------------------------------------------------

const isDark = () => {
  const asked = document.documentElement.dataset.theme;
  return asked ? asked === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

function remember(theme) {
  try {
    if (theme) localStorage.setItem("knockon-theme", theme);
    return localStorage.getItem("knockon-theme");
  } catch {
    return null; // some browsers keep nothing for files
  }
}

const remembered = remember();
if (remembered) document.documentElement.dataset.theme = remembered;
find("theme").addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  remember(theme);
  redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());

// ---- tables ----------------------------------------------------------------------------------------

/** Make the heads of a table buttons that sort it; missing values stay last. */
function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = element("button", { type: "button" });
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = head.dataset.first ?? (head.classList.contains("text") || column === 0 ? "up" : "down");
      const before = head.getAttribute("aria-sort");
      const up = before ? before === "descending" : first === "up";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      sortRows(table.tBodies[0], column, up);
    });
  });
}

function sortRows(body, column, up) {
  const key = (row) => {
    const cell = row.cells[column];
    if (!("value" in cell.dataset)) return cell.textContent.trim();
    return cell.dataset.value === "" || cell.dataset.value === "None" ? NaN : Number(cell.dataset.value);
  };
  const missing = (value) => value === "" || Number.isNaN(value);
  const compare = (a, b) =>
    typeof a === "string" || typeof b === "string" ? String(a).localeCompare(String(b), "en", { numeric: true }) : a - b;
  const keyed = [...body.rows].map((row) => [key(row), row]);
  keyed.sort(([a], [b]) => missing(a) - missing(b) || (up ? compare(a, b) : compare(b, a)));
  body.append(...keyed.map(([, row]) => row));
}

document.querySelectorAll("table.sortable").forEach((table) => table.tHead?.rows.length && sortable(table));

function showFamily(name) {
  document.querySelectorAll("[data-family]").forEach((part) => (part.hidden = Boolean(name) && part.dataset.family !== name));
}
if (find("family")) {
  find("family").addEventListener("change", (event) => showFamily(event.target.value));
  showFamily(find("family").value);
}

function showStratum(name) {
  document.querySelectorAll("#strata [data-metric]").forEach((row) => (row.hidden = row.dataset.metric !== name));
}
if (find("stratum")) {
  find("stratum").addEventListener("change", (event) => showStratum(event.target.value));
  showStratum(find("stratum").value);
}

// ---- conditions ------------------------------------------------------------------------------------

const MOST = 150; // rows that are shown unasked
const order = { key: "chosen", up: null };

/** One row for each condition: what it is, its scores by model, and how the chosen model does. */
function cases() {
  const values = data.scores[state.metric] ?? {};
  const metric = metricOf(state.metric);
  const album = data.portraits;
  return data.conditions.map((name, i) => {
    const chosen = values[state.model]?.[i] ?? null;
    const simple = metric.baseline ? (values[metric.baseline]?.[i] ?? null) : null;
    const row = album ? album.conditions.indexOf(name) : -1;
    return {
      name,
      chosen,
      cells: row < 0 ? null : album.real.cells[row],
      effect: row < 0 ? null : album.effect[row],
      gain: chosen === null || simple === null ? null : (metric.sign || 1) * (chosen - simple),
      ceiling: values[data.ceiling]?.[i] ?? null,
      others: Object.fromEntries(data.models.map((model) => [model.name, values[model.name]?.[i] ?? null])),
    };
  });
}

function columns() {
  const metric = metricOf(state.metric);
  const others = data.models.filter((model) => model.name !== state.model && data.scores[state.metric]?.[model.name]);
  const portrayed = data.portraits
    ? [
        { key: "cells", title: "real cells", hint: "Measured cells of the condition" },
        { key: "effect", title: "effect", hint: "Size of the real change of the mean against control (log1p, noise taken out)" },
      ]
    : [];
  return [
    { key: "name", title: "condition", hint: "" },
    ...portrayed,
    { key: "chosen", title: state.model, hint: `${state.metric} of ${state.model}`, model: state.model },
    { key: "gain", title: "over baseline", hint: `How much better than ${metric.baseline ?? "the best simple baseline"}; below 0 is worse` },
    { key: "ceiling", title: "ceiling", hint: "What a replicate scores" },
    ...others.map((model) => ({ key: model.name, title: model.name, hint: `${state.metric} of ${model.name}`, model: model.name, other: true })),
  ];
}

const valueOf = (row, column) => (column.other ? row.others[column.key] : row[column.key]);

/** Conditions in the order of the table; without a wish, the worst of the chosen model first. */
function ordered(rows, shown) {
  const column = shown.find((one) => one.key === order.key) ?? shown.find((one) => one.key === "chosen");
  const up = order.up ?? metricOf(state.metric).sign >= 0;
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  return [...rows].sort((one, two) => {
    const [a, b] = [valueOf(one, column), valueOf(two, column)];
    return (a === null) - (b === null) || (a === null ? 0 : up ? compare(a, b) : compare(b, a));
  });
}

function found(rows) {
  const wanted = find("search").value.trim().toLowerCase();
  return rows.filter((row) => row.name.toLowerCase().includes(wanted));
}

function head(shown) {
  const cells = shown.map((column) => {
    const button = element("button", { type: "button", textContent: column.title });
    const cell = element("th", { scope: "col", title: column.hint }, button);
    const isOrder = column.key === order.key;
    const up = order.up ?? metricOf(state.metric).sign >= 0;
    if (isOrder) cell.setAttribute("aria-sort", up ? "ascending" : "descending");
    button.addEventListener("click", () => {
      order.up = isOrder ? !up : column.key === "name";
      order.key = column.key;
      showCases();
      find("cases").tHead.querySelectorAll("button")[shown.indexOf(column)].focus();
    });
    return cell;
  });
  find("cases").tHead.replaceChildren(element("tr", {}, ...cells));
}

function showCases() {
  const shown = columns();
  head(shown);
  const rows = ordered(found(cases()), shown);
  const few = state.all ? rows : rows.slice(0, MOST);
  find("cases").tBodies[0].replaceChildren(...few.map((row) => line(row, shown)));
  find("count").textContent = `${rows.length.toLocaleString("en")} of ${data.conditions.length.toLocaleString("en")} conditions`;
  find("more").hidden = few.length === rows.length;
  find("more").textContent = `Show all ${rows.length.toLocaleString("en")}`;
}

function line(row, shown) {
  const cells = shown.map((column) => {
    const value = valueOf(row, column);
    if (column.key === "name") {
      const button = element("button", { type: "button", textContent: row.name });
      return element("th", { scope: "row" }, button);
    }
    const cell = element("td", { textContent: number(value) });
    if (column.key === "chosen") cell.className = "chosen";
    if (column.key === "gain" && value !== null) cell.className = value > 0 ? "better" : value < 0 ? "worse" : "";
    return cell;
  });
  const made = element("tr", {}, ...cells);
  made.dataset.condition = row.name;
  made.setAttribute("aria-selected", String(row.name === state.condition));
  made.addEventListener("click", () => choose(row.name));
  return made;
}

function choose(condition) {
  state.condition = condition;
  document.querySelectorAll("#cases tbody tr").forEach((row) => row.setAttribute("aria-selected", String(row.dataset.condition === condition)));
  showDetail();
}

function step(by) {
  const names = ordered(found(cases()), columns()).map((row) => row.name);
  const next = names[names.indexOf(state.condition) + by];
  if (next !== undefined) choose(next);
}

// ---- one condition ---------------------------------------------------------------------------------

function showDetail() {
  if (!data.portraits || state.condition === null) return;
  find("detail").hidden = false;
  find("case").textContent = state.condition;
  const names = ordered(found(cases()), columns()).map((row) => row.name);
  find("previous").disabled = names.indexOf(state.condition) <= 0;
  find("next").disabled = names.indexOf(state.condition) === names.length - 1;
  find("predictor").value = state.model;
  said();
  redraw();
}

/** How the chosen model does on the condition, in words. */
function said() {
  const i = data.conditions.indexOf(state.condition);
  const row = data.portraits.conditions.indexOf(state.condition);
  const cells = data.portraits.models[state.model]?.cells[row];
  const parts = [];
  if (row >= 0) parts.push(`${number(data.portraits.real.cells[row])} real cells, ${number(data.portraits.control.cells[row])} controls` + (cells ? `, ${number(cells)} predicted` : ""));
  const told = ["pearson_delta", "mse", "energy_distance", "discrimination", state.metric];
  for (const name of new Set(told)) {
    const value = data.scores[name]?.[state.model]?.[i];
    if (value === undefined || value === null) continue;
    const best = data.scores[name][data.ceiling]?.[i];
    parts.push(`${name} ${number(value)}` + (best === undefined || best === null ? "" : ` (ceiling ${number(best)})`));
  }
  find("said").textContent = parts.join(" · ");
}

function choices(select, names, chosen) {
  select.replaceChildren(...names.map((name) => element("option", { value: name, textContent: name, selected: name === chosen })));
}

function setModel(name) {
  state.model = name;
  find("model").value = name;
  find("predictor").value = name;
  showCases();
  showDetail();
}

function start() {
  const names = data.models.map((model) => model.name);
  state.model = (data.models.find((model) => !model.simple) ?? data.models[0]).name;
  choices(find("metric"), data.metrics.map((metric) => metric.name).filter((name) => data.scores[name]), state.metric);
  if (!data.scores[state.metric]) state.metric = find("metric").value;
  choices(find("model"), names, state.model);
  choices(find("predictor"), names, state.model);
  find("metric").addEventListener("change", (event) => {
    state.metric = event.target.value;
    order.key = "chosen";
    order.up = null;
    showCases();
    showDetail();
  });
  find("model").addEventListener("change", (event) => setModel(event.target.value));
  find("predictor").addEventListener("change", (event) => setModel(event.target.value));
  find("search").addEventListener("input", showCases);
  find("more").addEventListener("click", () => {
    state.all = true;
    showCases();
  });
  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));
  document.querySelectorAll(".switch button").forEach((button) =>
    button.addEventListener("click", () => {
      Object.assign(state, button.dataset);
      button.parentElement.querySelectorAll("button").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      redraw();
    }),
  );
  if (!data.conditions.length || !find("metric").value) return;
  showCases();
  state.condition = ordered(cases(), columns())[0]?.name ?? null;
  choose(state.condition);
}

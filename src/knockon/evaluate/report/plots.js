// The plots of a condition and of training. A plot is drawn when it comes into view, and the library read then.

let library = null;

/** Plotly, which is text until the first plot is looked at, so that the page opens at once. */
function plotly() {
  if (!library) {
    library = new Promise((resolve) => {
      const script = element("script", { textContent: find("plotly").textContent });
      setTimeout(() => {
        document.head.append(script);
        resolve(window.Plotly);
      });
    });
  }
  return library;
}

// ---- arrays ----------------------------------------------------------------------------------------

const decoded = new Map();

/** Rows of a packed array: numbers, NaN where there is none. Unpacked when first asked for. */
function rowOf(packed, row) {
  if (!decoded.has(packed)) {
    const bytes = Uint8Array.from(atob(packed.data), (letter) => letter.charCodeAt(0));
    const values = packed.step
      ? Float64Array.from(new Int16Array(bytes.buffer), (value) => (value === -32768 ? NaN : value * packed.step))
      : new Uint32Array(bytes.buffer);
    decoded.set(packed, values);
  }
  const width = packed.shape.slice(1).reduce((a, b) => a * b, 1);
  return Array.from(decoded.get(packed).subarray(row * width, (row + 1) * width));
}

const chunks = (values, width) => Array.from({ length: values.length / width }, (_, i) => values.slice(i * width, (i + 1) * width));

/** All of one condition that plots need. */
function sitter() {
  const album = data.portraits;
  const row = album.conditions.indexOf(state.condition);
  if (row < 0) return null;
  const side = (packed) => {
    const top = packed.zeros.shape[1];
    return {
      zeros: rowOf(packed.zeros, row),
      quantiles: top ? chunks(rowOf(packed.quantiles, row), packed.quantiles.shape[2]) : [],
      spots: chunks(rowOf(packed.spots, row), 4).filter((spot) => !Number.isNaN(spot[0])),
      center: rowOf(packed.center, row),
    };
  };
  const names = (indices) => indices.map((i) => album.genes[i]);
  const model = album.models[state.model];
  const given = model && model.cells[row] > 0;
  return {
    targets: new Set(state.condition.split(" | ")[0].split("+").map((part) => part.split("@")[0])),
    genes: names(rowOf(album.shown, row)),
    level: rowOf(album.level, row),
    change: rowOf(album.change, row),
    expected: rowOf(album.expected, row),
    real: side(album.real),
    control: side(album.control),
    predicted: given ? { change: rowOf(model.change, row), ...side(model) } : null,
    own: given
      ? { genes: names(rowOf(model.own, row)), level: rowOf(model.own_level, row), real: rowOf(model.own_real, row), change: rowOf(model.own_change, row) }
      : null,
  };
}

// ---- what all plots share --------------------------------------------------------------------------

const safe = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colorOf = (model) => (modelOf(model)?.color ?? ["#0072b2", "#4da3e0"])[isDark() ? 1 : 0];
const alpha = (color, share) => color + Math.round(share * 255).toString(16).padStart(2, "0");

const MARGIN = { l: 56, r: 12, t: 30, b: 44 };

function axis(title, more = {}) {
  return { title: { text: title, font: { size: 12.5 } }, gridcolor: css("--faint"), zerolinecolor: css("--soft"), zerolinewidth: 1, linecolor: css("--faint"), ...more };
}

function draw(place, traces, layout) {
  return plotly().then((Plotly) => {
    const whole = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("--ink"), family: getComputedStyle(document.body).fontFamily, size: 12 },
      margin: MARGIN,
      hoverlabel: { bgcolor: css("--paper"), bordercolor: css("--soft"), font: { color: css("--ink") } },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 12 } },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      ...layout,
    };
    const options = { responsive: true, displaylogo: false, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
    return Plotly.react(place, traces, whole, options);
  });
}

function say(place, text) {
  if (window.Plotly) window.Plotly.purge(place);
  place.replaceChildren(element("p", { textContent: text }));
}

function clear(place) {
  if (place.firstElementChild?.tagName === "P") place.replaceChildren();
}

/** From the least to the greatest of some values and 0, and a little more. */
function reach(...values) {
  const known = values.flat().filter(Number.isFinite);
  const [low, high] = [Math.min(0, ...known), Math.max(0, ...known)];
  const margin = 0.06 * (high - low || 1);
  return [low - margin, high + margin];
}

/** A line on which two values are equal. */
function diagonal(range) {
  return { x: range, y: range, mode: "lines", line: { color: css("--soft"), width: 1, dash: "dot" }, hoverinfo: "skip", showlegend: false };
}

/** Names beside the outermost points, as many as find room without covering each other or a point. */
function labels(place, x, y, names, ranges, others = []) {
  const across = (value) => ((value - ranges[0][0]) / (ranges[0][1] - ranges[0][0])) * (place.clientWidth - MARGIN.l - MARGIN.r);
  const down = (value) => ((value - ranges[1][0]) / (ranges[1][1] - ranges[1][0])) * (place.clientHeight - MARGIN.t - MARGIN.b);
  const points = names.map((_, i) => i).filter((i) => Number.isFinite(x[i]) && Number.isFinite(y[i]));
  const spots = [...points.map((i) => [x[i], y[i]]), ...others].map(([h, v]) => [across(h), down(v)]);
  points.sort((a, b) => Math.abs(x[b]) + Math.abs(y[b]) - Math.abs(x[a]) - Math.abs(y[a]));
  const placed = [];
  for (const i of points.slice(0, 60)) {
    const width = 6.6 * names[i].length + 4;
    const side = across(x[i]) + width + 8 > place.clientWidth - MARGIN.l - MARGIN.r ? -1 : x[i] < 0 && across(x[i]) > width + 8 ? -1 : 1;
    const near = across(x[i]) + side * 7;
    const [left, right] = side < 0 ? [near - width, near] : [near, near + width];
    const level = down(y[i]);
    const isFree = placed.every((other) => right < other.left - 3 || left > other.right + 3 || Math.abs(level - other.level) > 15);
    const isBare = spots.every(([h, v]) => h < left || h > right || Math.abs(level - v) > 8);
    if (isFree && isBare) placed.push({ left, right, level, side, i });
    if (placed.length === 10) break;
  }
  return placed.map(({ side, i }) => ({ x: x[i], y: y[i], text: safe(names[i]), showarrow: false, xanchor: side < 0 ? "right" : "left", xshift: 7 * side, font: { size: 11, color: css("--soft") } }));
}

const signed = (value) => (Number.isNaN(value) ? "unknown" : (value > 0 ? "+" : "") + value.toFixed(2));

// ---- the plots of a condition ----------------------------------------------------------------------

function drawChange(place, who) {
  if (!who?.predicted) return say(place, `${state.model} did not predict this condition.`);
  clear(place);
  const color = colorOf(state.model);
  const hover = (genes, level, x, y) => genes.map((gene, i) => `<b>${safe(gene)}</b><br>observed ${signed(x[i])}<br>predicted ${signed(y[i])}<br>mean in control ${level[i].toFixed(2)}`);
  const mine = { x: who.change, y: who.predicted.change };
  const range = reach(mine.x, mine.y, who.own.real, who.own.change);
  const traces = [
    diagonal(range),
    { ...mine, mode: "markers", type: "scatter", name: safe(state.model), text: hover(who.genes, who.level, mine.x, mine.y), hoverinfo: "text", marker: { color: alpha(color, 0.6), size: who.genes.map((gene) => (who.targets.has(gene) ? 13 : 7)), symbol: who.genes.map((gene) => (who.targets.has(gene) ? "star" : "circle")), line: { color: css("--card"), width: 0.6 } } },
    { x: who.own.real, y: who.own.change, mode: "markers", type: "scatter", name: "only the model changes", text: hover(who.own.genes, who.own.level, who.own.real, who.own.change), hoverinfo: "text", marker: { color, size: 7, symbol: "diamond-open" } },
  ];
  return draw(place, traces, { xaxis: axis("observed change (log1p)", { range }), yaxis: axis("predicted change (log1p)", { range }), showlegend: false, margin: { ...MARGIN, t: 10 }, annotations: labels(place, mine.x, mine.y, who.genes, [range, range], who.own.real.map((value, i) => [value, who.own.change[i]])), hovermode: "closest" });
}

function drawGenes(place, who) {
  if (!who || !who.real.zeros.length) return say(place, "No distributions were kept of this condition.");
  clear(place);
  const many = Math.max(3, Math.min(who.real.zeros.length, Math.floor(place.clientWidth / 78)));
  const genes = who.genes.slice(0, many).map(safe);
  const sides = [
    ["control", who.control, css("--soft")],
    ["real", who.real, css("--ink")],
    ...(who.predicted ? [[safe(state.model), who.predicted, colorOf(state.model)]] : []),
  ];
  const width = 0.8 / sides.length;
  const at = (i, s) => i + (s - (sides.length - 1) / 2) * width;
  const violins = sides.flatMap(([name, side, color], s) =>
    side.quantiles.slice(0, many).map((values, i) => ({
      type: "violin", name, legendgroup: name, x0: at(i, s), y: values.filter((value) => !Number.isNaN(value)), points: false, spanmode: "hard", scalemode: "width", width: 0.95 * width, box: { visible: true, width: 0.3 }, line: { color, width: 1.1 }, fillcolor: alpha(color, 0.3), hoverinfo: "y+name", hoveron: "violins", showlegend: false,
    })),
  );
  const bars = sides.map(([name, side, color], s) => ({
    type: "bar", name, legendgroup: name, x: genes.map((_, i) => at(i, s)), width: 0.9 * width, y: side.zeros.slice(0, many).map((share) => (Number.isNaN(share) ? null : 100 * share)), yaxis: "y2", marker: { color: alpha(color, 0.75) }, text: genes, textposition: "none", hovertemplate: "%{text}: silent in %{y:.0f} % of cells<extra>%{fullData.name}</extra>",
  }));
  const ticks = { tickmode: "array", tickvals: genes.map((_, i) => i), ticktext: genes, range: [-0.5, many - 0.5], showgrid: false, zeroline: false };
  return draw(place, [...violins.filter((one) => one.y.length), ...bars], {
    barmode: "overlay",
    violinmode: "overlay",
    margin: { ...MARGIN, b: genes.some((gene) => gene.length > 7) ? 70 : 30 },
    xaxis: axis("", { anchor: "y2", tickangle: genes.some((gene) => gene.length > 7) ? -35 : 0, ...ticks }),
    yaxis: axis("expression (log1p)", { domain: [0.34, 1], rangemode: "tozero" }),
    yaxis2: axis("silent, %", { domain: [0, 0.26], range: [0, 100], dtick: 50 }),
  });
}

function drawMap(place, who) {
  if (!who || !who.real.spots.length) return say(place, "No map was kept of this condition.");
  clear(place);
  const along = state.map === "effect";
  const [a, b] = along ? [2, 3] : [0, 1];
  find("axes").textContent = along
    ? "Large dots are means of all cells, small ones a sample. On the horizontal axis control has its mean at 0 and the real cells at 1: a prediction at .5 has half of the effect. The vertical axis is how control cells vary besides."
    : "The first two principal components of training cells, the same for every condition. Large dots are means of all cells, small ones a sample.";
  const sides = [
    ["control", who.control, css("--soft"), "circle-open"],
    ["real", who.real, css("--ink"), "circle"],
    ...(who.predicted ? [[safe(state.model), who.predicted, colorOf(state.model), "x-thin-open"]] : []),
  ];
  const clouds = sides.map(([name, side, color, symbol]) => ({
    type: "scatter", mode: "markers", name, legendgroup: name, x: side.spots.map((spot) => spot[a]), y: side.spots.map((spot) => spot[b]), marker: { color: symbol === "circle" ? alpha(color, 0.45) : color, symbol, size: 7, line: { width: 1.3, color } }, opacity: 0.8, hoverinfo: "name",
  }));
  const centers = sides.map(([name, side, color]) => ({
    type: "scatter", mode: "markers", name: `mean of ${name}`, legendgroup: name, showlegend: false, x: [side.center[a]], y: [side.center[b]], marker: { color, size: 15, symbol: "circle", line: { color: css("--card"), width: 2.5 } }, hovertemplate: `mean of ${name}<extra></extra>`,
  }));
  return draw(place, [...clouds, ...centers], {
    xaxis: axis(along ? "along the real effect (0 control, 1 real)" : "component 1", { zeroline: along }),
    yaxis: axis(along ? "across it" : "component 2", { zeroline: false }),
    hovermode: "closest",
  });
}

function drawInteraction(place, who) {
  const known = who ? who.genes.map((_, i) => i).filter((i) => !Number.isNaN(who.expected[i])) : [];
  const beyond = state.double === "beyond";
  find("together").textContent = "";
  if (!known.length) return say(place, who && who.targets.size > 1 ? "This needs its parts measured alone, which they were not." : "One perturbation alone: there is nothing to add up.");
  clear(place);
  const take = (values) => known.map((i) => values[i]);
  const [sum, real, genes] = [take(who.expected), take(who.change), take(who.genes)];
  const predicted = who.predicted ? take(who.predicted.change) : null;
  find("together").textContent = beyond
    ? "What the combination does more than its parts together. On the diagonal the interaction is predicted exactly; a flat line at 0 is a model that only adds."
    : "Observed changes under both perturbations against the sum of the changes under each. On the diagonal they only add up; steeper is synergy, flatter buffering.";
  const color = colorOf(state.model);
  if (beyond) {
    if (!predicted) return say(place, `${state.model} did not predict this condition.`);
    const x = real.map((value, i) => value - sum[i]);
    const y = predicted.map((value, i) => value - sum[i]);
    const text = genes.map((gene, i) => `<b>${safe(gene)}</b><br>beyond the sum, observed ${signed(x[i])}<br>predicted ${signed(y[i])}`);
    const range = reach(x, y);
    return draw(place, [diagonal(range), { type: "scatter", mode: "markers", name: safe(state.model), x, y, text, hoverinfo: "text", marker: { color: alpha(color, 0.6), size: 7 } }], { xaxis: axis("observed, beyond the sum", { range }), yaxis: axis("predicted, beyond the sum", { range }), showlegend: false, margin: { ...MARGIN, t: 10 }, annotations: labels(place, x, y, genes, [range, range]), hovermode: "closest" });
  }
  const hover = (what, values) => genes.map((gene, i) => `<b>${safe(gene)}</b><br>sum of single effects ${signed(sum[i])}<br>${what} ${signed(values[i])}`);
  const range = reach(sum, real, predicted ?? []);
  const traces = [
    diagonal(range),
    { type: "scatter", mode: "markers", name: "real", x: sum, y: real, text: hover("observed", real), hoverinfo: "text", marker: { color: alpha(css("--ink"), 0.5), size: 7 } },
  ];
  if (predicted) traces.push({ type: "scatter", mode: "markers", name: safe(state.model), x: sum, y: predicted, text: hover("predicted", predicted), hoverinfo: "text", marker: { color, size: 7, symbol: "x-thin-open", line: { width: 1.3, color } } });
  return draw(place, traces, { xaxis: axis("sum of single effects (log1p)", { range }), yaxis: axis("change under both (log1p)", { range }), annotations: labels(place, sum, real, genes, [range, range], (predicted ?? []).map((value, i) => [sum[i], value])), hovermode: "closest" });
}

function drawCurve(place) {
  const curve = data.curves[place.dataset.curve];
  const color = colorOf(curve.model);
  const names = Object.keys(curve.values);
  const dashes = ["dot", "dash", "dashdot", "longdash"];
  const traces = names.map((name, i) => ({
    type: "scatter", mode: "lines", connectgaps: true, name: safe(name), x: curve.step, y: curve.values[name],
    line: name === "total" ? { color, width: 2 } : name.startsWith("valid") ? { color: css("--ink"), width: 2 } : { color: css("--soft"), width: 1.2, dash: dashes[i % dashes.length] },
  }));
  return draw(place, traces, { xaxis: axis("step", { zeroline: false }), yaxis: axis("loss"), hovermode: "x unified" });
}

// ---- when they are drawn ---------------------------------------------------------------------------

const PLOTS = { change: drawChange, genes: drawGenes, map: drawMap, interaction: drawInteraction };
const due = new Set();

const watch = new IntersectionObserver(
  (entries) =>
    entries.forEach((entry) => {
      entry.target.inView = entry.isIntersecting;
      if (entry.isIntersecting) paint(entry.target);
    }),
  { rootMargin: "300px" },
);

function paint(place) {
  if (!due.has(place)) return;
  due.delete(place);
  const drawn = place.dataset.curve === undefined ? PLOTS[place.id](place, sitter()) : drawCurve(place);
  Promise.resolve(drawn).then(() => place.setAttribute("data-drawn", state.condition ?? ""));
}

/** Draw again what depends on the condition, the model or the theme: what is in view now, the rest when it comes. */
function redraw() {
  document.querySelectorAll(".plot").forEach((place) => {
    due.add(place);
    if (place.inView) paint(place);
  });
}

data.curves.forEach((curve, i) => {
  const place = element("div", { className: "plot curve" });
  place.dataset.curve = i;
  find("curves").append(element("figure", { className: "card" }, element("figcaption", { textContent: `Training of ${curve.name}` }), place));
});
if (data.portraits) find("doubles").hidden = !data.portraits.conditions.some((name) => name.split(" | ")[0].includes("+"));
document.querySelectorAll(".plot").forEach((place) => watch.observe(place));
redraw();
start();

/** Paper is light, whatever the screen is. */
let unprinted;
addEventListener("beforeprint", () => {
  unprinted = document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
  redraw();
  document.querySelectorAll(".plot").forEach(paint);
});
addEventListener("afterprint", () => {
  if (unprinted) document.documentElement.dataset.theme = unprinted;
  else delete document.documentElement.dataset.theme;
  redraw();
});

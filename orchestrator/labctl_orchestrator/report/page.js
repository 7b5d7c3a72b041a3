"use strict";
// Draws the charts, picks slices, sorts and filters the table. All data is in the page; nothing is loaded.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (selector, within = document) => Array.from(within.querySelectorAll(selector));
  const views = {};
  const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });

  // ------------------------------------------------------------ colours

  const themes = find('input[name="theme"]');
  function setTheme(value) {
    if (value === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = value;
  }
  function kept(value) {
    try { // a browser may keep nothing for files
      if (value !== undefined) localStorage.setItem("labctl-theme", value);
      return localStorage.getItem("labctl-theme");
    } catch { return null; }
  }
  themes.forEach((input) => input.addEventListener("change", () => { setTheme(input.value); kept(input.value); }));
  const before = themes.find((input) => input.value === kept());
  if (before) { before.checked = true; setTheme(before.value); }

  // ------------------------------------------------------------ charts

  const picks = find("select[data-pick]");
  const isPicked = (row) => !row.slice || picks.every((pick) => row.slice[pick.dataset.pick] === Number(pick.value));

  function rowsOf(chart) {
    const measure = document.querySelector(`select[data-measure="${chart.name}"]`);
    return data[chart.data].filter((row) => isPicked(row)
      && (!measure || row.measure === measure.value)
      && (!chart.needs || row[chart.needs] !== null && row[chart.needs] !== undefined)
      && (!chart.metric || row.metric === chart.metric));
  }

  async function draw(chart) {
    const place = document.getElementById(`${chart.name}-chart`);
    const rows = rowsOf(chart);
    if (views[chart.name]) { views[chart.name].finalize(); delete views[chart.name]; }
    place.replaceChildren();
    if (!rows.length) {
      const none = document.createElement("p");
      none.className = "none";
      none.textContent = "No measured run matches.";
      place.append(none);
    } else {
      const spec = { ...chart.spec, datasets: { [chart.data]: rows } };
      if (chart.row_height) spec.height = chart.row_height * rows.length;
      // Vega describes what it draws by itself, each mark apart; the figure's own text does it better.
      const drawing = place.appendChild(document.createElement("div"));
      drawing.setAttribute("aria-hidden", "true");
      const drawn = await vegaEmbed(drawing, spec, { mode: "vega-lite", renderer: "svg", actions: false, ast: true });
      views[chart.name] = drawn;
    }
    const table = document.querySelector(`details[data-chart="${chart.name}"]`);
    if (table.open) fill(table, chart, rows);
    else table.querySelector(".scroll")?.remove();
  }

  function fill(details, chart, rows) {
    details.querySelector(".scroll")?.remove();
    const box = document.createElement("div");
    box.className = "scroll";
    box.tabIndex = 0;
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", `Data of the chart ${chart.title}`);
    const table = document.createElement("table");
    table.createCaption().textContent = `${chart.title}: ${rows.length} ${rows.length === 1 ? "row" : "rows"}`;
    const head = table.createTHead().insertRow();
    for (const column of chart.columns) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = column.unit ? `${column.title}, ${column.unit}` : column.title;
      if (typeof rows[0]?.[column.field] === "number") cell.className = "n";
      head.append(cell);
    }
    const body = table.createTBody();
    for (const row of rows) {
      const line = body.insertRow();
      chart.columns.forEach((column, place) => {
        const value = row[column.field];
        const cell = place ? line.insertCell() : line.appendChild(document.createElement("th"));
        if (!place) cell.scope = "row";
        const is = typeof value === "number";
        cell.textContent = is ? number.format(value / (column.scale || 1)) : value ?? "–";
        if (is) cell.className = "n";
      });
    }
    box.append(table);
    details.append(box);
  }

  function drawAll() {
    const picked = document.getElementById("picked");
    if (picked) {
      const shown = data.cells.filter(isPicked).length;
      picked.textContent = `${shown} of ${data.cells.length} runs: ` + picks.map((pick) =>
        `${pick.parentElement.firstChild.textContent.trim()} ${pick.selectedOptions[0].textContent}`).join(", ");
    }
    return Promise.all(data.charts.map(draw));
  }

  for (const details of find("details[data-chart]")) {
    const chart = data.charts.find((one) => one.name === details.dataset.chart);
    details.addEventListener("toggle", () => { if (details.open) fill(details, chart, rowsOf(chart)); });
  }
  picks.forEach((pick) => pick.addEventListener("change", drawAll));
  find("select[data-measure]").forEach((select) => select.addEventListener("change", () =>
    draw(data.charts.find((chart) => chart.name === select.dataset.measure))));

  // ------------------------------------------------------------ the table

  const table = document.getElementById("raw");
  const body = table.tBodies[0];
  const raw = data.raw;
  const rows = Array.from(body.rows, (element, place) => ({ element, values: raw.rows[place], text: element.textContent.toLowerCase() }));
  const heads = find("th[aria-sort]", table);

  function order(one, other) {
    if (one === other) return 0;
    if (one === null) return 1; // unknown values last
    if (other === null) return -1;
    if (typeof one === "number" && typeof other === "number") return one - other;
    return String(one).localeCompare(String(other), "en", { numeric: true });
  }
  function sortBy(place) {
    const down = heads[place].getAttribute("aria-sort") === "ascending";
    heads.forEach((head, at) => head.setAttribute("aria-sort", at !== place ? "none" : down ? "descending" : "ascending"));
    rows.sort((one, other) => {
      const [a, b] = [one.values[place], other.values[place]];
      const by = order(a, b);
      return down && a !== null && b !== null ? -by : by;
    });
    body.append(...rows.map((row) => row.element));
  }
  heads.forEach((head, place) => head.firstElementChild.addEventListener("click", () => sortBy(place)));

  const filter = document.getElementById("filter");
  const columns = find("select[data-column]");
  function filterRows() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const kept = words.every((word) => row.text.includes(word))
        && columns.every((select) => !select.value || row.element.cells[select.dataset.column].textContent === select.value);
      row.element.hidden = !kept;
      shown += kept;
    }
    document.getElementById("shown").textContent = `${shown} of ${rows.length} rows`;
  }
  filter.addEventListener("input", filterRows);
  columns.forEach((select) => select.addEventListener("change", filterRows));

  function csv(value) {
    const text = value === null ? "" : String(value);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }
  document.getElementById("save").addEventListener("click", () => {
    const lines = [raw.columns, ...rows.filter((row) => !row.element.hidden).map((row) => row.values)];
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.map((line) => line.map(csv).join(",")).join("\n") + "\n"], { type: "text/csv" }));
    link.download = `${data.name}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });

  // ------------------------------------------------------------ what a program may read

  window.labctlReport = { views, data, drawn: drawAll() };
})();

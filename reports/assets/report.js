"use strict";
// Draws the charts and makes the table of cases sortable. Text of records reaches the page by textContent alone.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  // "@role" -> "var(--role)": a theme then needs no second drawing. Data are left as they are.
  const colored = (value, key) => {
    if (key === "values" || key === "datasets") return value;
    if (Array.isArray(value)) return value.map((item) => colored(item));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, colored(v, k)]));
    return typeof value === "string" && /^@[a-z_]+[0-9]?$/.test(value) ? `var(--${value.slice(1)})` : value;
  };

  const options = { ast: true, actions: false, mode: "vega-lite", config: colored(data.config), renderer: "svg", tooltip: { theme: "custom" } };
  for (const box of document.querySelectorAll("[data-figure]")) {
    vegaEmbed(box, colored(data.specs[box.dataset.figure]), options).catch((error) => {
      box.textContent = `This chart could not be drawn: ${error.message}`;
      console.error(error);
    });
  }

  const root = document.documentElement;
  const remember = (theme) => {
    // a page opened from disk may have no storage
    try { localStorage.setItem("dsa-bench-theme", theme); } catch { return; }
  };
  const remembered = () => {
    try { return localStorage.getItem("dsa-bench-theme"); } catch { return null; }
  };
  if (["light", "dark"].includes(remembered())) root.dataset.theme = remembered();
  document.getElementById("theme").addEventListener("click", () => {
    const isDark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
    remember(root.dataset.theme);
  });

  const table = document.querySelector(".cases");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const closeDetails = () => body.querySelectorAll(".detail").forEach((row) => row.remove());

  const filter = document.getElementById("filter");
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const show = () => {
    closeDetails();
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      row.hidden = !words.every((word) => texts.get(row).includes(word));
      count += row.hidden ? 0 : 1;
    }
    document.getElementById("shown").textContent = `${count} of ${rows.length} cases`;
  };
  filter.addEventListener("input", show);
  show();

  const sortKey = (cell) => cell.dataset.key ?? (cell.textContent === "–" ? "" : cell.textContent);
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, index) => {
    const button = head.querySelector("button");
    if (!button) return;
    const isNumber = head.classList.contains("number");
    button.addEventListener("click", () => {
      closeDetails();
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const keyed = rows.map((row) => [sortKey(row.cells[index]), row]);
      keyed.sort(([a], [b]) => {
        // what is missing stays at the end either way
        if (a === "" || b === "") return (a === "") - (b === "");
        return sign * (isNumber ? Number(a) - Number(b) : a.localeCompare(b));
      });
      keyed.forEach(([, row]) => body.append(row));
    });
  });

  const element = (name, text, parent) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    parent?.append(made);
    return made;
  };
  const small = (titles, lines, parent) => {
    const made = element("table", undefined, parent);
    const head = element("tr", undefined, element("thead", undefined, made));
    titles.forEach((title) => element("th", title, head));
    const lower = element("tbody", undefined, made);
    for (const line of lines) {
      const row = element("tr", undefined, lower);
      line.forEach((text) => element("td", text, row));
    }
  };
  const drawSamples = (samples, parent) => {
    const spec = structuredClone(data.strip);
    spec.data.values = samples.points.map(([i, t, r]) => ({ i, t, r }));
    spec.encoding.y.title = `time (${samples.unit})`;
    if (new Set(samples.points.map(([, , r]) => r)).size < 2) spec.encoding.color = { value: "@sparse0" };
    const box = element("div", undefined, parent);
    box.className = "strip";
    vegaEmbed(box, colored(spec), options).catch((error) => { box.textContent = error.message; });
  };
  const open = (row) => {
    const wasOpen = row.nextElementSibling?.classList.contains("detail");
    closeDetails();
    if (wasOpen) return;
    const detail = element("tr");
    detail.className = "detail";
    const cell = element("td", undefined, detail);
    cell.colSpan = row.cells.length;
    const found = data.details[row.dataset.case] ?? {};
    const command = row.querySelector(".command code");
    if (command) element("code", command.textContent, element("p", undefined, cell));
    for (const [severity, text] of found.flags ?? []) {
      const line = element("p", undefined, cell);
      line.className = "flag";
      element("span", severity, line).className = `badge is-${severity}`;
      line.append(text);
    }
    if (found.log) element("pre", found.log.join("\n"), cell).className = "log";
    if (found.samples) drawSamples(found.samples, cell);
    if (found.measured) small(data.measured, found.measured, cell);
    if (found.stages)
      small(["stage", "implementation", "kernel time", "share", "FLOP rate", "traffic"], found.stages, cell);
    if (found.kernels) small(["kernel", "stage", "calls", "time"], found.kernels, cell);
    if (!Object.keys(found).length) element("p", "Nothing more was recorded for this case.", cell);
    row.after(detail);
  };

  const copy = async (button) => {
    const text = button.parentElement.querySelector("code").textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    } catch {
      // without the right to copy, mark the command so that one key does it
      getSelection().selectAllChildren(button.parentElement.querySelector("code"));
      button.textContent = "marked";
    }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  };
  body.addEventListener("click", (event) => {
    const button = event.target.closest(".copy");
    if (button) return void copy(button);
    const row = event.target.closest("tr[data-case]");
    if (row && getSelection().isCollapsed) open(row);
  });
})();

// Curves that can be hovered, zoomed and switched by arm and seed, in place of a figure's picture on the screen.
(() => {
  "use strict";
  const { arms, panels } = JSON.parse(document.getElementById("curves-data").textContent);
  const MEANS = "means", SEEDS = "seeds", LISTED = 12;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const off = new Set(); // names of arms, seeds as text, MEANS and SEEDS
  const plots = [];
  const hex = (rgb) => `#${rgb.match(/\d+/g).slice(0, 3).map((part) => Number(part).toString(16).padStart(2, "0")).join("")}`;
  const ink = () => hex(getComputedStyle(document.body).color);
  const paint = (arm) => (!arm ? "#CC79A7" : arm.colour === "#000000" ? ink() : arm.colour);
  const element = (tag, parent, text = "", name = "") => {
    const made = parent.appendChild(document.createElement(tag));
    made.textContent = text;
    made.className = name;
    return made;
  };

  // "both": the mean of an arm; "both/seed-1": a cell; "both/seed-1 ended": where it stopped; else marks alone
  function lineOf(name) {
    const [, armName, seed, ended] = /^(.+?)(?:\/seed-(\d+)( ended)?)?$/.exec(name);
    const arm = arms.find((a) => a.name === armName);
    return { name, arm, seed, mark: !arm ? "diamond" : ended ? "cross" : "" };
  }

  const shown = ({ arm, seed }) =>
    !arm || !(off.has(arm.name) || (seed === undefined ? off.has(MEANS) : off.has(SEEDS) || off.has(seed)));

  function seriesOf(line, count) {
    const isMean = line.arm && line.seed === undefined;
    const width = isMean ? 2.5 : 1;
    const dashes = isMean && Array.isArray(line.arm.dashes) ? line.arm.dashes[1].map((d) => d * width) : undefined;
    const opacity = isMean || line.mark ? "" : count > 40 ? "59" : "a6"; // alpha itself is for what is near the cursor
    const paths = line.mark ? { paths: () => null } : {};
    const stroke = () => paint(line.arm) + opacity;
    return { label: line.name, stroke, width, dash: dashes, points: { show: false }, ...paths };
  }

  function marks(u, lines) {
    const { ctx } = u, r = 5 * devicePixelRatio;
    lines.forEach((line, i) => {
      if (!line.mark || !u.series[i + 1].show) return;
      u.data[0].forEach((step, k) => {
        const value = u.data[i + 1][k];
        if (value == null) return;
        const x = u.valToPos(step, "x", true), y = u.valToPos(value, "y", true);
        const { left, top, width, height } = u.bbox;
        if (x < left || x > left + width || y < top || y > top + height) return;
        const cross = [[-r, -r], [r, r], [-r, r], [r, -r]], diamond = [[0, -r], [r, 0], [0, r], [-r, 0], [0, -r]];
        ctx.beginPath();
        ctx.strokeStyle = ctx.fillStyle = paint(line.arm);
        ctx.lineWidth = 2 * devicePixelRatio;
        (line.mark === "cross" ? cross : diamond).forEach(([dx, dy], n) =>
          ctx[n === 0 || (line.mark === "cross" && n === 2) ? "moveTo" : "lineTo"](x + dx, y + dy));
        if (line.mark === "cross") ctx.stroke();
        else ctx.fill();
      });
    });
  }

  function shade(u, band) {
    const [high, low] = band.map((value) => u.valToPos(value, "y", true)).sort((a, b) => a - b);
    u.ctx.fillStyle = "rgba(128, 128, 128, .25)";
    const top = Math.max(high, u.bbox.top), bottom = Math.min(low, u.bbox.top + u.bbox.height);
    if (bottom > top) u.ctx.fillRect(u.bbox.left, top, u.bbox.width, bottom - top);
  }

  function read(u, lines, output, unit) {
    const at = u.cursor.idx;
    output.textContent = "";
    if (at == null) return void (output.textContent = "Move over the curves to read them; drag to zoom, double-click for all.");
    element("span", output, `step ${u.data[0][at].toLocaleString()}`);
    const visible = lines.map((line, i) => [line, i + 1]).filter(([, i]) => u.series[i].show);
    const few = visible.filter(([line]) => line.seed !== undefined).length <= LISTED;
    for (const [line, i] of visible) {
      const isNear = u.series[i].near, value = u.data[i][u.cursor.idxs[i]];
      if (value == null || line.mark === "cross" || !(few || isNear || line.seed === undefined)) continue;
      const span = element("span", output, "", isNear ? "near" : "");
      if (line.arm) element("i", span).style.background = paint(line.arm);
      const name = !line.arm ? line.name : `${line.arm.words} ${line.seed === undefined ? "mean" : `seed ${line.seed}`}`;
      span.append(`${name} ${value}`);
    }
    element("span", output, unit);
    output.style.minHeight = `${output.offsetHeight}px`; // so that nothing below moves while one reads
  }

  function draw(panel, place) {
    element("p", place, panel.title, "title");
    const area = element("div", place, "", "plot"), output = element("output", place);
    const lines = panel.tables.flatMap((table) => Object.keys(table[1])).map(lineOf);
    const tables = panel.tables.map((table) => [table[0], ...Object.values(table[1])]);
    const count = lines.filter((line) => line.seed !== undefined).length;
    const axis = { stroke: ink, grid: { stroke: "rgba(128, 128, 128, .25)", width: 1 }, ticks: { show: false } };
    const u = new uPlot({
      width: area.clientWidth, height: 250, legend: { show: false },
      scales: { x: { time: false } },
      axes: [{ ...axis, size: 30 }, { ...axis, size: 62 }],
      series: [{}, ...lines.map((line) => ({ ...seriesOf(line, count), show: shown(line) }))],
      cursor: { sync: { key: "steps" }, focus: { prox: 20 }, points: { size: 6 } },
      focus: { alpha: 0.25 },
      hooks: {
        drawClear: panel.band ? [(u) => shade(u, panel.band)] : [],
        draw: [(u) => marks(u, lines)],
        setSeries: [(u, i, { focus }) => focus && u.series.forEach((series, k) => { series.near = k === i; })],
        setCursor: [(u) => read(u, lines, output, panel.unit)],
      },
    }, uPlot.join(tables), area);
    read(u, lines, output, panel.unit);
    area.tabIndex = 0;
    area.setAttribute("role", "application");
    area.setAttribute("aria-label", `${panel.title}, ${panel.unit}, over optimizer steps. Left and right: read; plus and minus: zoom`);
    area.addEventListener("keydown", (event) => keys(u, event));
    new ResizeObserver(() => u.setSize({ width: area.clientWidth, height: 250 })).observe(area);
    plots.push({ u, lines });
  }

  function keys(u, event) {
    const steps = u.data[0], at = u.cursor.idx ?? 0, { min, max } = u.scales.x;
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key], zoom = { "+": 0.5, "-": 2 }[event.key];
    if (move) {
      const left = u.valToPos(steps[Math.min(Math.max(at + move, 0), steps.length - 1)], "x");
      u.setCursor({ left, top: u.over.clientHeight / 2 });
    } else if (zoom) {
      const half = ((max - min) * zoom) / 2, middle = u.cursor.idx == null ? (min + max) / 2 : steps[at];
      u.setScale("x", { min: Math.max(middle - half, steps[0]), max: Math.min(middle + half, steps.at(-1)) });
    } else if (event.key === "Escape") u.setScale("x", { min: steps[0], max: steps.at(-1) });
    else return;
    event.preventDefault();
  }

  function apply() {
    for (const { u, lines } of plots) u.batch(() => lines.forEach((line, i) => u.setSeries(i + 1, { show: shown(line) })));
    for (const button of document.querySelectorAll(".curves button[data-key]"))
      button.setAttribute("aria-pressed", !off.has(button.dataset.key));
  }

  function toggle(parent, key, text, arm) {
    const button = element("button", parent);
    button.type = "button";
    button.dataset.key = key;
    if (arm) element("i", button).style.background = arm.colour === "#000000" ? "currentColor" : arm.colour;
    button.append(text);
    button.onclick = () => (off.delete(key) || off.add(key), apply());
  }

  function bar(place, seeds) {
    const first = element("div", place, "", "keys");
    for (const arm of arms) toggle(first, arm.name, arm.words, arm);
    toggle(first, MEANS, "mean over seeds");
    toggle(first, SEEDS, "each seed");
    const action = (parent, text, act) => {
      const button = element("button", parent, text);
      button.type = "button";
      button.onclick = act;
    };
    action(first, "whole range", () => plots.forEach(({ u }) => u.setScale("x", { min: u.data[0][0], max: u.data[0].at(-1) })));
    const more = element("details", place);
    element("summary", more, "Seeds");
    const list = element("div", more, "", "keys");
    for (const seed of seeds) toggle(list, seed, seed);
    action(list, "all", () => (seeds.forEach((seed) => off.delete(seed)), apply()));
    action(list, "none", () => (seeds.forEach((seed) => off.add(seed)), apply()));
  }

  const names = new Set(panels.flatMap((panel) => Object.keys(panel.tables[0][1]).map((name) => lineOf(name).seed)));
  const seeds = [...names].sort((a, b) => a - b);
  const watcher = new IntersectionObserver((seen) => {
    for (const { target, isIntersecting } of seen) {
      if (!isIntersecting) continue;
      watcher.unobserve(target);
      target.classList.add("live");
      const place = element("div", target, "", "curves");
      target.insertBefore(place, target.firstChild);
      bar(place, seeds);
      for (const panel of panels) if (panel.figure === target.dataset.curves) draw(panel, place);
      apply();
    }
  }, { rootMargin: "800px" });
  for (const image of document.querySelectorAll("figure img[data-figure]")) {
    const figure = image.closest("figure");
    figure.dataset.curves = image.dataset.figure;
    if (panels.some((panel) => panel.figure === image.dataset.figure)) watcher.observe(figure);
  }
  dark.addEventListener("change", () => plots.forEach(({ u }) => u.redraw()));
})();

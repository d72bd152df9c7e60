"use strict";
(() => {
  document.documentElement.classList.add("js");
  const GRID = 100000;
  const plots = [...document.querySelectorAll(".plot[data-axes]")].map(element => {
    const [left, right, low, high, isLog] = element.dataset.axes.split(" ").map(Number);
    const named = [...element.querySelectorAll("path[data-name]")];
    return {
      element, left, right, low, high, isLog, named,
      lines: element.querySelector(".lines"),
      marks: element.querySelector(".marks"),
      read: element.parentElement.querySelector(".read"),
      points: null,
      view: [0, GRID, 0, GRID],
    };
  });
  if (!plots.length) return;
  let range = [0, GRID];

  // The points of the curves, read from their paths when they are first needed.
  const pointsOf = plot => plot.points ??= plot.named.map(path => {
    const numbers = (path.getAttribute("d").match(/-?\d+/g) || []).map(Number);
    const isDot = path.classList.contains("dot");  // M x y h 0
    const points = [];
    for (let at = 0; at + 1 < numbers.length; at += isDot ? 3 : 2) points.push([numbers[at], numbers[at + 1]]);
    return {name: path.dataset.name, points, isSparse: path.matches(".dot, .dots")};
  });
  const valueAt = (plot, y) => {
    const share = 1 - y / GRID;
    return plot.isLog ? plot.low * (plot.high / plot.low) ** share : plot.low + (plot.high - plot.low) * share;
  };
  const placeAt = (plot, x) => plot.left + (plot.right - plot.left) * x / GRID;
  const placeLabel = place => place >= 1000 ? Math.round(place).toLocaleString("en") : label(place);

  const label = value => {
    const size = Math.abs(value);
    if (size >= 1e15 || (size > 0 && size < 1e-3)) {
      const [mantissa, exponent] = value.toExponential(2).split("e");
      return `${Number(mantissa)}e${Number(exponent)}`;
    }
    for (const [least, unit, suffix] of [[1e9, 1e9, "G"], [1e6, 1e6, "M"], [1e4, 1e3, "k"]])
      if (size >= least) return `${Number((value / unit).toPrecision(5))}${suffix}`;
    return `${Number(value.toPrecision(5))}`;
  };
  const ticks = (low, high, isLog) => {
    if (isLog && high / low >= 8) {
      for (const digits of [[1, 2, 5], [1]]) {
        const found = [];
        for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
          for (const digit of digits) {
            const value = digit * 10 ** power;
            if (value >= low && value <= high) found.push(value);
          }
        if (found.length >= 2 && found.length <= 8) return found;
        if (digits.length === 1 && found.length > 8) {
          const every = Math.ceil(found.length / 6);
          return found.filter((_, number) => number % every === 0);
        }
      }
    }
    const least = (high - low) / 6;
    const power = 10 ** Math.floor(Math.log10(least));
    const step = [1, 2, 5, 10].map(digit => digit * power).find(each => each >= least * (1 - 1e-9));
    const found = [];
    for (let number = Math.ceil(low / step - 1e-9); number * step <= high + step * 1e-9; number++) found.push(number * step);
    return found;
  };

  const draw = plot => {
    const [x0, x1] = range;
    let [y0, y1] = [0, GRID];
    if (x1 - x0 < GRID) {
      const inside = pointsOf(plot).flatMap(curve => curve.points)
        .filter(([x, y]) => x >= x0 && x <= x1 && y >= 0 && y <= GRID).map(([, y]) => y);
      if (inside.length > 1) {
        [y0, y1] = inside.reduce(([low, high], y) => [Math.min(low, y), Math.max(high, y)], [GRID, 0]);
        const room = Math.max((y1 - y0) * 0.08, GRID / 50);
        [y0, y1] = [Math.max(y0 - room, 0), Math.min(y1 + room, GRID)];
      }
    }
    plot.view = [x0, x1, y0, y1];
    plot.lines.setAttribute("viewBox", `${x0} ${y0} ${x1 - x0} ${y1 - y0}`);
    plot.marks?.setAttribute("viewBox", `${x0} 0 ${x1 - x0} ${GRID}`);
    for (const old of plot.element.querySelectorAll(":scope > i")) old.remove();
    const add = (axis, side, share, value) => {
      const line = document.createElement("i"), text = document.createElement("b");
      line.className = axis;
      line.style[side] = `${share * 100}%`;
      text.textContent = label(value);
      line.append(text);
      plot.element.prepend(line);
    };
    const low = valueAt(plot, y1), high = valueAt(plot, y0);
    for (const value of ticks(low, high, plot.isLog)) {
      const share = plot.isLog ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
      add("y", "bottom", share, value);
    }
    const [left, right] = [placeAt(plot, x0), placeAt(plot, x1)];
    for (const value of ticks(left, right, false)) add("x", "left", (value - left) / (right - left), value);
  };
  const show = (from, to) => {
    const width = Math.min(Math.max(to - from, 50), GRID);
    const begin = Math.min(Math.max(from, 0), GRID - width);
    range = [begin, begin + width];
    document.documentElement.classList.toggle("zoomed", width < GRID);
    plots.forEach(draw);
  };
  for (const button of document.querySelectorAll("button.all")) button.addEventListener("click", () => show(0, GRID));

  const nearest = (points, x) => {
    let [low, high] = [0, points.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - points[low - 1][0] < points[low][0] - x ? points[low - 1] : points[low];
  };
  const tell = (plot, share) => {
    const x = plot.view[0] + (plot.view[1] - plot.view[0]) * share;
    const said = [];
    let at = null;
    for (const {name, points, isSparse} of pointsOf(plot)) {
      if (!points.length) continue;
      const near = (plot.view[1] - plot.view[0]) / 20;
      if (x < points[0][0] - near || x > points[points.length - 1][0] + near) continue;
      const [there, y] = nearest(points, x);
      at ??= there;
      const where = isSparse && there !== at ? ` (at ${placeLabel(placeAt(plot, there))})` : "";
      said.push(`${name} ${Math.abs(y) >= 99 * GRID ? "beyond" : label(valueAt(plot, y))}${where}`);
    }
    if (at === null) return;
    plot.read.textContent = `${placeLabel(placeAt(plot, at))}: ${said.join(" · ")}`;
    plot.cursor.style.left = `${(at - plot.view[0]) / (plot.view[1] - plot.view[0]) * 100}%`;
    plot.cursor.hidden = at < plot.view[0] || at > plot.view[1];
  };

  for (const plot of plots) {
    const {element} = plot;
    const added = name => {
      const part = document.createElement("div");
      part.className = name;
      part.hidden = true;
      element.append(part);
      return part;
    };
    plot.cursor = added("cursor");
    const band = added("band");
    let begun = null;
    const shareOf = event => {
      const box = element.getBoundingClientRect();
      return Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    };
    element.addEventListener("pointerdown", event => {
      if (event.button) return;
      begun = shareOf(event);
      element.setPointerCapture(event.pointerId);
    });
    element.addEventListener("pointermove", event => {
      const now = shareOf(event);
      tell(plot, now);
      if (begun === null) return;
      band.hidden = false;
      band.style.left = `${Math.min(begun, now) * 100}%`;
      band.style.width = `${Math.abs(now - begun) * 100}%`;
    });
    const end = event => {
      band.hidden = true;
      if (begun === null) return;
      const now = shareOf(event), width = plot.view[1] - plot.view[0];
      const [from, to] = [Math.min(begun, now), Math.max(begun, now)];
      begun = null;
      if (event.type === "pointerup" && to - from > 0.01) show(plot.view[0] + from * width, plot.view[0] + to * width);
    };
    element.addEventListener("pointerup", end);
    element.addEventListener("pointercancel", end);
    element.addEventListener("pointerleave", () => { plot.cursor.hidden = true; plot.read.textContent = ""; });
    element.addEventListener("dblclick", () => show(0, GRID));
    element.addEventListener("keydown", event => {
      const [from, to] = range, width = to - from;
      const moves = {
        "+": [from + width / 4, to - width / 4], "-": [from - width / 2, to + width / 2], "0": [0, GRID],
        ArrowLeft: [from - width / 4, to - width / 4], ArrowRight: [from + width / 4, to + width / 4],
      };
      if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in moves)) return;
      event.preventDefault();
      show(...moves[event.key]);
    });
  }
})();

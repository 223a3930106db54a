// Draws every figure of the page from its JSON. Nothing is loaded from anywhere.
for (const block of document.querySelectorAll("script.plot-json")) {
  const target = document.getElementById(block.dataset.figure);
  try {
    const figure = JSON.parse(block.textContent);
    const layout = Object.assign({}, figure.layout, { autosize: true });
    delete layout.width; // the page decides, so that it fits a phone
    if (matchMedia("(max-width: 40rem)").matches) {
      layout.legend = Object.assign({}, layout.legend, { orientation: "h", x: 0, xanchor: "left", y: 0, yref: "container", yanchor: "bottom" });
    }
    // where nothing can hover, the buttons would cover the title for good
    const buttons = matchMedia("(hover: hover)").matches ? "hover" : false;
    Plotly.newPlot(target, figure.data, layout, { responsive: true, displaylogo: false, displayModeBar: buttons }).catch((error) => {
      target.textContent = "This figure could not be drawn: " + error;
    });
  } catch (error) {
    target.textContent = "This figure could not be drawn: " + error;
  }
}

// plotly names clip paths and gradients at random: with the same numbers the same figure is the same SVG
(() => { let seed = 1; Math.random = () => (seed = seed * 16807 % 2147483647) / 2147483647 })()
// a PDF is as large as the figure: margins of the page would shrink it to fit between them
document.head.appendChild(document.createElement("style")).textContent = "@page { margin: 0 } #kaleido-image { display: block }"

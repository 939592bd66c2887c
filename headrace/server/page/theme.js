// Dark, light or as the system has it: read before anything is drawn, so that nothing flashes.
"use strict";
try {
  const theme = JSON.parse(localStorage.getItem("headrace.theme"));
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
} catch {
  // A browser that keeps nothing has the system's theme.
}

// A text area that grows with its text, and Enter sends it.

export const coarse = matchMedia("(pointer: coarse)"); // on a touch keyboard Enter starts a new line

export function typing(area, form, send) {
  area.oninput = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
  };
  area.onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || coarse.matches) return;
    event.preventDefault();
    form.requestSubmit();
  };
  form.onsubmit = (event) => {
    event.preventDefault();
    if (area.value.trim()) send(area.value.trim());
  };
}

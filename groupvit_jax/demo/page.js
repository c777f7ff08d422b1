() => {
  // Gradio pastes by a button alone: here Ctrl+V anywhere on the page does.
  document.addEventListener('paste', event => {
    const file = [...event.clipboardData.files].find(file => file.type.startsWith('image/'));
    const input = document.querySelector('#picture input[type=file]');
    if (!file || !input) return;
    event.preventDefault();
    const files = new DataTransfer();
    files.items.add(file);
    input.files = files.files;
    input.dispatchEvent(new Event('change', {bubbles: true}));
  });

  // The class name under the pointer, from the label map that comes with the legend.
  const canvas = document.createElement('canvas');
  const labels = canvas.getContext('2d', {willReadFrequently: true});
  const tip = document.createElement('div');
  tip.id = 'class-name';
  tip.hidden = true;
  tip.style.cssText = 'position:fixed;z-index:99;padding:2px 8px;border-radius:4px;background:#000c;color:#fff;' +
    'font:14px system-ui,sans-serif;pointer-events:none';
  document.body.append(tip);
  let drawn = '';

  function nameAt(image, event) {
    const map = document.querySelector('#label-map');
    if (!map || !map.complete || !map.naturalWidth) return '';
    if (drawn !== map.src) {
      canvas.width = map.naturalWidth;
      canvas.height = map.naturalHeight;
      labels.drawImage(map, 0, 0);
      drawn = map.src;
    }
    // The image fits into its box, and is in the middle of it.
    const box = image.getBoundingClientRect();
    const scale = Math.min(box.width / image.naturalWidth, box.height / image.naturalHeight);
    const [width, height] = [scale * image.naturalWidth, scale * image.naturalHeight];
    const x = (event.clientX - box.left - (box.width - width) / 2) / width;
    const y = (event.clientY - box.top - (box.height - height) / 2) / height;
    if (x < 0 || x >= 1 || y < 0 || y >= 1) return '';
    const label = labels.getImageData(Math.floor(x * canvas.width), Math.floor(y * canvas.height), 1, 1).data[0];
    return document.querySelector(`#legend tr[data-label="${label}"] .name`)?.textContent ?? '';
  }

  document.addEventListener('mousemove', event => {
    const image = event.target.closest?.('#overlay') && document.querySelector('#overlay img');
    const name = image ? nameAt(image, event) : '';
    tip.hidden = !name;
    tip.textContent = name;
    tip.style.left = `${event.clientX + 14}px`;
    tip.style.top = `${event.clientY + 14}px`;
  });
}

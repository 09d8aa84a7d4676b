// Renders DiceBear pictures as raw RGB: node render.mjs SET COUNT SPLIT OUT.bin [PIXELS]
// With PIXELS 0 it writes what is in each picture instead (hair, clothes, colours, ...), as a line of JSON.
// A picture depends on its set, split and index alone, so splits never share a seed and a re-run is identical.
import { createAvatar } from '@dicebear/core';
import * as styles from '@dicebear/collection';
import { Resvg } from '@resvg/resvg-js';
import { createWriteStream } from 'node:fs';
import { once } from 'node:events';

const PASTELS = ['b6e3f4', 'c0aede', 'd1d4f9', 'ffd5dc', 'ffdfbf', 'c9e4c5', 'f4e1c1', 'dfe3e8'];
const AVATAR = {
  scale: 118,
  translateY: 4,
  backgroundColor: PASTELS,
  skinColor: ['614335', '8d5524', 'ae5d29', 'd08b5b', 'edb98a', 'ffdbb4'],
  hairColor: ['2c1b18', '4a312c', '724133', 'a55728', 'c93305', 'b58143', 'd6b370', 'ecdcbf', 'e8e1e1'],
  facialHairColor: ['2c1b18', '4a312c', '724133', 'a55728', 'b58143'],
  facialHairProbability: 15,
  eyes: ['closed', 'default', 'happy', 'side', 'squint', 'surprised', 'wink'],
  mouth: ['concerned', 'default', 'disbelief', 'sad', 'screamOpen', 'serious', 'smile', 'tongue', 'twinkle'],
  clothing: ['blazerAndShirt', 'blazerAndSweater', 'collarAndSweater', 'hoodie', 'overall', 'shirtCrewNeck', 'shirtScoopNeck', 'shirtVNeck'],
  accessoriesColor: ['262e33', '3c4f5c', '25557c', 'ff5c5c'],
  accessoriesProbability: 30,
  accessories: ['prescription01', 'prescription02', 'round'],
};
const SUNGLASSES = { ...AVATAR, accessories: ['sunglasses', 'wayfarers'], accessoriesProbability: 100, accessoriesColor: ['262e33', '3c4f5c', '25557c'] };
const PLAIN = { backgroundColor: PASTELS };

const filtered = (svg, id, filter) =>
  svg.replace(/(<svg[^>]*>)([\s\S]*)<\/svg>/, `$1${filter}<g filter="url(#${id})">$2</g></svg>`);

// Wet edges wander (displacement), the colour pools and thins (soft noise times the colour), the paper is cream.
const watercolour = (svg, index) => {
  const filter = `<filter id="w" x="-10%" y="-10%" width="120%" height="120%" color-interpolation-filters="sRGB">
    <feTurbulence type="fractalNoise" baseFrequency="0.03" numOctaves="3" seed="${index % 9973}" result="ripple"/>
    <feFlood flood-color="#faf3e3" result="paper"/>
    <feDisplacementMap in="SourceGraphic" in2="ripple" scale="22" xChannelSelector="R" yChannelSelector="G"/>
    <feComposite in2="paper" operator="over"/>
    <feGaussianBlur stdDeviation="1.2"/>
    <feColorMatrix type="saturate" values="1.35" result="paint"/>
    <feTurbulence type="fractalNoise" baseFrequency="0.025" numOctaves="4" seed="${(index * 7 + 3) % 9973}"/>
    <feColorMatrix type="matrix" values="0.7 0 0 0 0.66  0.7 0 0 0 0.66  0.7 0 0 0 0.66  0 0 0 0 1"/>
    <feGaussianBlur stdDeviation="5" result="wash"/>
    <feComposite in="paint" in2="wash" operator="arithmetic" k1="0.9" k2="0" k3="0.1" k4="0" result="washed"/>
    <feComposite in="washed" in2="paper" operator="over"/>
  </filter>`;
  return filtered(svg, 'w', filter);
};

// No colours: every one becomes the grey of its brightness.
const grey = (svg) => {
  const row = '0.30 0.59 0.11 0 0';
  const filter = `<filter id="g" color-interpolation-filters="sRGB"><feColorMatrix values="${row} ${row} ${row} 0 0 0 1 0"/></filter>`;
  return filtered(svg, 'g', filter);
};

const SETS = {
  avatars: ['avataaars', AVATAR],
  sunglasses: ['avataaars', SUNGLASSES],
  watercolour: ['avataaars', { ...AVATAR, backgroundColor: ['faf3e3'] }, watercolour],
  ink: ['lorelei', { backgroundColor: ['ffffff'], scale: 115, translateY: 4 }],
  grey: ['avataaars', AVATAR, grey],
  smiles: ['bigSmile', PLAIN],
  adventurer: ['adventurer', PLAIN],
  bigSmile: ['bigSmile', PLAIN],
  dylan: ['dylan', PLAIN],
  robots: ['bottts', { ...PLAIN, scale: 90 }],
  micah: ['micah', PLAIN],
  notionists: ['notionists', { backgroundColor: ['ffffff', ...PASTELS] }],
  openPeeps: ['openPeeps', PLAIN],
  personas: ['personas', PLAIN],
  toonHead: ['toonHead', PLAIN],
};

const [set, count, split, path, pixels = '64'] = process.argv.slice(2);
if (!(set in SETS) || !path) {
  console.error(`usage: node render.mjs SET COUNT SPLIT OUT.bin [PIXELS]; SET is one of ${Object.keys(SETS).join(', ')}`);
  process.exit(2);
}
const [style, options, filter] = SETS[set];
const out = createWriteStream(path);
for (let index = 0; index < Number(count); index++) {
  const picture = createAvatar(styles[style], { seed: `${set}/${split}/${index}`, ...options });
  if (pixels === '0') {
    if (!out.write(JSON.stringify(picture.toJson().extra) + '\n')) await once(out, 'drain');
    continue;
  }
  let svg = picture.toString();
  if (filter) svg = filter(svg, index);
  // Rendered at twice the size and averaged 2x2: one antialiased resize, the same for every set.
  const size = 2 * Number(pixels);
  const rgba = new Resvg(svg, { fitTo: { mode: 'width', value: size } }).render().pixels;
  const rgb = Buffer.alloc((size / 2) ** 2 * 3);
  for (let y = 0, o = 0; y < size / 2; y++) {
    for (let x = 0; x < size / 2; x++) {
      for (let c = 0; c < 3; c++, o++) {
        const i = ((2 * y) * size + 2 * x) * 4 + c;
        rgb[o] = (rgba[i] + rgba[i + 4] + rgba[i + size * 4] + rgba[i + size * 4 + 4] + 2) >> 2;
      }
    }
  }
  if (!out.write(rgb)) await once(out, 'drain');
}
out.end();

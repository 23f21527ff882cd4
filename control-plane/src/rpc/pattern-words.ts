// What the patterns of the schemas' fields allow, for a person: a violation shows these words and no regular
// expression. A test finds the patterns without words, and checks the examples.

/** What a pattern allows: "must be WORDS, such as EXAMPLE". */
export type PatternWords = { readonly words: string; readonly example: string };

const name = "1 to 63 lower-case letters, digits and -, with a letter or a digit at both ends";
const digest = {
  words: "a digest, sha256: and 64 hexadecimal digits, or empty",
  example: `sha256:${"0123456789abcdef".repeat(4)}`,
};
const idCharacters = "01h455vb4pex5vsknk084sn02q";

function id(kind: string, prefix: string): PatternWords {
  return { words: `the id of ${kind}, ${prefix}_ and 26 characters`, example: `${prefix}_${idCharacters}` };
}

/** By pattern. */
export const patternWords: ReadonlyMap<string, PatternWords> = new Map([
  ["^ins_[0-9a-hjkmnp-tv-z]{26}$", id("an instance", "ins")],
  ["^(ins_[0-9a-hjkmnp-tv-z]{26})?$", id("an instance", "ins")],
  ["^nod_[0-9a-hjkmnp-tv-z]{26}$", id("a node", "nod")],
  ["^org_[0-9a-hjkmnp-tv-z]{26}$", id("an organization", "org")],
  ["^ent_[0-9a-hjkmnp-tv-z]{26}$", id("an enrollment token", "ent")],
  [
    "^[A-Za-z0-9][A-Za-z0-9._:/@-]*$",
    {
      words: "the name of an image: a letter or a digit, and then letters, digits and . _ : / @ -",
      example: "pytorch/pytorch:2.9.0",
    },
  ],
  [
    "^[A-Za-z_][A-Za-z0-9_]*$",
    { words: "the name of a variable: letters, digits and _, without a digit in front", example: "MODEL_PATH" },
  ],
  [
    "^[a-z0-9]([a-z0-9._/-]*[a-z0-9])?$",
    {
      words: "the name of a label: lower-case letters, digits and . _ / -, with a letter or a digit at both ends",
      example: "team",
    },
  ],
  [
    "^([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?$",
    {
      words: "the value of a label: letters, digits and . _ -, with a letter or a digit at both ends, or empty",
      example: "vision-2",
    },
  ],
  [
    "^([A-Z0-9]([A-Z0-9-]{0,38}[A-Z0-9])?)?$",
    {
      words: "a GPU model as ListOffers names it, in upper-case letters, digits and -, or empty for any",
      example: "H100-SXM",
    },
  ],
  ["^[A-Z]{2}$", { words: "the ISO 3166-1 code of a country, two upper-case letters", example: "ES" }],
  ["^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", { words: name, example: "madrid" }],
  ["^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?$", { words: `${name}, or empty`, example: "node-1" }],
  [
    "^GPU-[A-Za-z0-9-]{1,80}$",
    { words: "the UUID of a GPU as nvidia-smi prints it", example: "GPU-5a1b6e8c-7d0f-4c3e-9a2b-1f0e8d7c6b5a" },
  ],
  ["^(sha256:[0-9a-f]{64})?$", digest],
]);

// Access to the document of `nvidia-smi -q -x`: elements by name, and values that the tool may refuse to give.

import { XMLParser, XMLValidator } from "fast-xml-parser";

/** An element with its children and attributes. */
export type XmlNode = Readonly<Record<string, unknown>>;

/** Texts by which the tool says that it does not know. Bracketed on older drivers. */
const unknownValues = new Set([
  "",
  "n/a",
  "not available",
  "not supported",
  "not found",
  "err!",
  "unknown error",
  "unknown",
  "requested functionality has been deprecated",
  "insufficient permissions",
  "gpu is lost",
  "gpu requires reset",
  "requires reset",
]);

/** Texts that stand where a value would be when the device itself is in trouble. */
const troubleValues = new Set(["err!", "unknown error", "gpu is lost", "gpu requires reset", "requires reset"]);

/** The document's root; undefined where the text is no XML. */
export function parseDocument(xml: string): XmlNode | undefined {
  // The parser alone takes broken documents without a word.
  if (XMLValidator.validate(xml) !== true) return undefined;
  try {
    // Values stay text: "0x0001" and "00000000:1B:00.0" are not numbers here. Entities are none of this document's.
    const parsed: unknown = new XMLParser({
      ignoreAttributes: false,
      parseTagValue: false,
      parseAttributeValue: false,
      processEntities: false,
      trimValues: true,
    }).parse(xml);
    return isNode(parsed) ? parsed : undefined;
  } catch {
    return undefined;
  }
}

/**
 * What can be saved of a document that broke off or is damaged: each whole element of that name, and the text of the
 * first one that is not whole. Elements of the name must not stand in each other.
 */
export function salvage(
  xml: string,
  name: string,
): { readonly whole: readonly XmlNode[]; readonly broken: string | undefined } {
  const whole: XmlNode[] = [];
  let broken: string | undefined;
  // Cut where one begins: what is damaged in one does not reach the next.
  const [, ...parts] = xml.split(new RegExp(`(?=<${name}[ >])`));
  for (const part of parts) {
    const end = part.indexOf(`</${name}>`);
    const node = end < 0 ? undefined : child(parseDocument(part.slice(0, end + name.length + 3)), name);
    if (node === undefined) broken ??= part;
    else whole.push(node);
  }
  return { whole, broken };
}

/** The children of that name. */
export function elements(node: XmlNode | undefined, name: string): XmlNode[] {
  const value = node?.[name];
  return (Array.isArray(value) ? value : [value]).filter(isNode);
}

/** The element at the end of a path; undefined where there is none, or where a text stands in its place. */
export function child(node: XmlNode | undefined, ...path: readonly string[]): XmlNode | undefined {
  let current = node;
  for (const name of path) current = current === undefined ? undefined : elements(current, name)[0];
  return current;
}

/** The text of a child; empty where there is none. */
export function textOf(node: XmlNode | undefined, name: string): string {
  const value = node?.[name];
  return typeof value === "string" ? value.trim() : "";
}

/** A text without brackets, in lower case, to be compared. */
export function bare(value: string): string {
  return value
    .replace(/^\[(.*)\]$/, "$1")
    .trim()
    .toLowerCase();
}

/** The value, or undefined where the tool says that it has none. */
export function known(value: string): string | undefined {
  return unknownValues.has(bare(value)) ? undefined : value;
}

/** Whether the tool says by this text that the device is in trouble. */
export function isTrouble(value: string): boolean {
  return troubleValues.has(bare(value));
}

/** A whole number with its unit ("" for none), digits behind the point left off; undefined for everything else. */
export function numberIn(value: string, unit: string): number | undefined {
  const match = /^([0-9]{1,9})(?:\.[0-9]{1,9})? ?([A-Za-z%]*)$/.exec(value);
  return match !== null && match[2] === unit ? Number(match[1]) : undefined;
}

/** The same with the digits behind the point. */
export function decimalIn(value: string, unit: string): number | undefined {
  const match = /^([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([A-Za-z%]*)$/.exec(value);
  return match !== null && match[2] === unit ? Number(match[1]) : undefined;
}

/** "Yes" or "No"; "Enabled" or "Disabled"; undefined for everything else. */
export function flagIn(value: string): boolean | undefined {
  const text = bare(value);
  if (text === "yes" || text === "enabled") return true;
  return text === "no" || text === "disabled" ? false : undefined;
}

function isNode(value: unknown): value is XmlNode {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

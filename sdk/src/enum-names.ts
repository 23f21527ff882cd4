/** Names of generated enum values, for messages and for unions of strings. */

/**
 * The name of an enum's value: "RUNNING" for InstanceState.RUNNING, and "UNSPECIFIED" for a value that a newer
 * server knows and this version does not.
 */
export function nameOf<E extends Readonly<Record<string, number>>>(enumObject: E, value: number): keyof E & string {
  for (const name of Object.keys(enumObject)) {
    if (enumObject[name] === value) return name;
  }
  return "UNSPECIFIED";
}

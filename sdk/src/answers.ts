/** Reading the server's answers. */
import { ClodeiError } from "./errors.ts";

/** The part of an answer that the API promises. */
export function answered<T>(value: T | undefined, name: string): T {
  if (value !== undefined) return value;
  throw new ClodeiError("internal", "INTERNAL", `the server's answer lacks its ${name}`);
}

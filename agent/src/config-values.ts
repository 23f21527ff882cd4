// How the texts of settings are read: each throws an Error whose message says what is allowed and repeats nothing, since
// one of the settings is a secret.

import { isIP, isIPv4 } from "node:net";
import { resolve } from "node:path";
import { normalizeAllowlistEntry } from "@clodei/proto/image-reference";

export const text = (value: string): string => value;

export const folder = (value: string): string => {
  if (value.includes("\0")) throw new Error("must be a path");
  return resolve(value);
};

export const wholeNumber =
  (least: number, most: number) =>
  (value: string): number => {
    const parsed = /^[0-9]{1,12}$/.test(value) ? Number(value) : Number.NaN;
    if (!(parsed >= least && parsed <= most)) throw new Error(`must be a whole number from ${least} to ${most}`);
    return parsed;
  };

export const httpsUrl = (value: string): string => {
  const url = URL.canParse(value) ? new URL(value) : undefined;
  if (url?.protocol !== "https:") throw new Error("must be an https URL, for example https://api.example.com:8443");
  if (url.username !== "" || url.password !== "") throw new Error("must not carry credentials");
  return url.origin;
};

export const socketPath = (value: string): string => {
  const path = value.startsWith("unix://") ? value.slice("unix://".length) : value;
  if (!path.startsWith("/")) throw new Error("must be the path of a unix socket");
  return path;
};

export const allowlist = (value: string): readonly string[] =>
  value
    .split(",")
    .map((entry) => entry.trim())
    .filter((entry) => entry !== "")
    .map(normalizeAllowlistEntry);

export const addresses = (value: string): readonly string[] => {
  const list = value
    .split(",")
    .map((entry) => entry.trim())
    .filter((entry) => entry !== "");
  if (list.some((entry) => isIP(entry) === 0)) throw new Error("must be IP addresses, separated by commas");
  return list;
};

export const network = (value: string): string => {
  const [address = "", bits = ""] = value.split("/");
  if (!isIPv4(address) || !/^(8|9|1[0-9]|2[0-8])$/.test(bits))
    throw new Error("must be an IPv4 range such as 10.213.0.0/16, from /8 to /28");
  return value;
};

export const oneOf =
  <T extends string>(...values: readonly T[]) =>
  (value: string): T => {
    const found = values.find((candidate) => candidate === value);
    if (found === undefined) throw new Error(`must be one of ${values.join(", ")}`);
    return found;
  };

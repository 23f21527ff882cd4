import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import {
  defaultImageAllowlist,
  formatImageReference,
  isImageAllowed,
  normalizeAllowlistEntry,
  parseImageReference,
} from "./image-reference.ts";

const digest = `sha256:${"0123456789abcdef".repeat(4)}`;

/** The normalized form, or undefined. */
function normalize(text: string): string | undefined {
  const reference = parseImageReference(text);
  return reference === undefined ? undefined : formatImageReference(reference);
}

function isAllowed(text: string, allowlist: readonly string[] = defaultImageAllowlist): boolean {
  const reference = parseImageReference(text);
  return reference !== undefined && isImageAllowed(reference, allowlist);
}

test("references are normalized as Docker does it", () => {
  const cases: [string, string][] = [
    ["busybox", "docker.io/library/busybox:latest"],
    ["busybox:1.36", "docker.io/library/busybox:1.36"],
    ["library/busybox", "docker.io/library/busybox:latest"],
    ["docker.io/busybox", "docker.io/library/busybox:latest"],
    ["index.docker.io/busybox", "docker.io/library/busybox:latest"],
    ["index.docker.io/pytorch/pytorch", "docker.io/pytorch/pytorch:latest"],
    ["pytorch/pytorch:2.9.0-cuda13.0-cudnn9-runtime", "docker.io/pytorch/pytorch:2.9.0-cuda13.0-cudnn9-runtime"],
    ["ghcr.io/clodei/hello", "ghcr.io/clodei/hello:latest"],
    ["nvcr.io/nvidia/cuda:13.0.1-base-ubuntu24.04", "nvcr.io/nvidia/cuda:13.0.1-base-ubuntu24.04"],
    ["localhost/hello", "localhost/hello:latest"],
    ["localhost:5000/hello:v1", "localhost:5000/hello:v1"],
    ["10.0.0.1:5000/a/b/c:v1", "10.0.0.1:5000/a/b/c:v1"],
    ["busybox:5000/x", "busybox:5000/x:latest"],
    [`busybox@${digest}`, `docker.io/library/busybox@${digest}`],
    [`busybox:1.36@${digest}`, `docker.io/library/busybox:1.36@${digest}`],
    [`localhost:5000/x@${digest}`, `localhost:5000/x@${digest}`],
    ["a__b/c--d/e.f_g", "docker.io/a__b/c--d/e.f_g:latest"],
    ["busybox:UPPER", "docker.io/library/busybox:UPPER"],
  ];
  for (const [text, expected] of cases) assert.equal(normalize(text), expected, text);
});

test("malformed and ambiguous references are refused", () => {
  const hostile = [
    "",
    "/",
    ":",
    "@",
    "busybox:",
    "busybox@",
    ":latest",
    `@${digest}`,
    "/busybox",
    "busybox/",
    "a//b",
    "Busybox",
    "Pytorch/pytorch",
    "GHCR.IO/clodei/x",
    "pytorch/Pytorch",
    "..",
    "../busybox",
    "pytorch/../evil/x",
    "pytorch/..",
    "ghcr.io/clodei/../evil",
    "a..b/c",
    "./busybox",
    "pytorch/./x",
    "pytorch/%2e%2e/evil",
    "pytorch%2Fx",
    "pytorch/x?y",
    "pytorch/x#y",
    "pytorch/x y",
    " busybox",
    "busybox ",
    "busybox\n",
    "busybox\0",
    "pytorch\\x",
    "http://ghcr.io/clodei/x",
    "https://docker.io/library/busybox",
    "user:pw@ghcr.io/clodei/x",
    "evil.com@ghcr.io/clodei/x",
    `busybox@${digest}@${digest}`,
    `busybox@${digest}:tag`,
    "busybox@latest",
    "busybox@sha256:abc",
    `busybox@${digest.toUpperCase()}`,
    `busybox@${digest}0`,
    `busybox@sha512:${"a".repeat(128)}`,
    "a".repeat(64),
    `${"0123456789abcdef".repeat(4)}:latest`,
    digest,
    "busybox:a:b",
    "busybox:a/b:c:d",
    `busybox:${"t".repeat(129)}`,
    "busybox:.tag",
    "busybox:-tag",
    "busybox:tag!",
    "ghcr.io.:443/x",
    "docker.io./library/x",
    ".docker.io/x",
    "-a.io/x",
    "a-.io/x",
    "a.io:0/x",
    "a.io:65536/x",
    "a.io:/x",
    "a.io:5000:5000/x",
    "[::1]:5000/x",
    "_a/b",
    "a_/b",
    "a/-b",
    "a/b-",
    "a/b.",
    "a/b___c",
    "a/.b",
    `${"a".repeat(250)}/library`,
    `ghcr.io/${"a".repeat(248)}`,
    "ghcr.io/",
    "busybo\u0445",
    "busybox\u200b",
    "ｂusybox",
  ];
  for (const text of hostile) assert.equal(normalize(text), undefined, JSON.stringify(text));
});

test("the default allowlist admits what it names", () => {
  const allowed = [
    "busybox",
    "library/python:3.14",
    "docker.io/python",
    "index.docker.io/library/python",
    "aitorgarmen/demo",
    "ghcr.io/clodei/hello",
    "ghcr.io/clodei/deep/er:v1",
    "pytorch/pytorch",
    `nvidia/cuda@${digest}`,
    "nvcr.io/nvidia/pytorch:26.01-py3",
    "nvcr.io/any/thing",
    "tensorflow/tensorflow",
  ];
  for (const text of allowed) assert.equal(isAllowed(text), true, text);
});

test("look-alikes of allowed names are not allowed", () => {
  const hostile = [
    "pytorchevil/x",
    "pytorch-evil/x",
    "evil/pytorch",
    "evil/pytorch/x",
    "ghcr.io/clodeievil/x",
    "ghcr.io/clodei",
    "ghcr.io/pytorch/x",
    "ghcr.io/library/busybox",
    "evil.io/library/busybox",
    "evil.io/clodei/hello",
    "evil.io/ghcr.io/clodei/x",
    "evil.io/docker.io/library/x",
    "nvcr.io.evil.com/nvidia/cuda",
    "nvcr.io:444/nvidia/cuda",
    "nvcr.iox/nvidia/cuda",
    "xnvcr.io/nvidia/cuda",
    "docker.io:443/library/busybox",
    "registry-1.docker.io/library/busybox",
    "docker.io.evil.com/library/busybox",
    "index.docker.io.evil.com/library/busybox",
    "localhost/library/busybox",
    "localhost:5000/pytorch/pytorch",
    "127.0.0.1/library/busybox",
    "quay.io/pytorch/pytorch",
    "library.evil/busybox",
  ];
  for (const text of hostile) assert.equal(isAllowed(text), false, text);
});

test("a reference is judged by its name, whatever stands in tag and digest", () => {
  assert.equal(isAllowed(`evil/x:library@${digest}`), false);
  assert.equal(isAllowed("evil/x:pytorch"), false);
  assert.equal(isAllowed(`pytorch/x:evil@${digest}`), true);
});

test("entries of an allowlist are written in full", () => {
  const cases: [string, string][] = [
    ["library/", "docker.io/library/"],
    ["pytorch/", "docker.io/pytorch/"],
    ["nvcr.io/", "nvcr.io/"],
    ["ghcr.io/clodei/", "ghcr.io/clodei/"],
    ["docker.io/", "docker.io/"],
    ["index.docker.io/", "docker.io/"],
    ["index.docker.io/pytorch/", "docker.io/pytorch/"],
    ["localhost:5000/", "localhost:5000/"],
    ["localhost/", "localhost/"],
    ["library/busybox", "docker.io/library/busybox"],
    ["busybox", "docker.io/library/busybox"],
    ["ghcr.io/clodei/hello", "ghcr.io/clodei/hello"],
    ["pytorch/sub/", "docker.io/pytorch/sub/"],
  ];
  for (const [entry, expected] of cases) {
    assert.equal(normalizeAllowlistEntry(entry), expected, entry);
    assert.equal(normalizeAllowlistEntry(expected), expected, "writing it in full twice changes nothing");
  }
});

test("malformed entries are refused by name, never ignored or taken for everything", () => {
  for (const entry of [
    "",
    "/",
    "//",
    "*",
    "pytorch/*",
    "Pytorch/",
    "ghcr.io",
    "a..b/",
    "../",
    "pytorch/../",
    "pytorch//",
    "busybox:latest",
    ".",
    " library/",
    "localhost",
  ]) {
    assert.throws(
      () => normalizeAllowlistEntry(entry),
      (error: unknown) => error instanceof RangeError && error.message.includes(`"${entry}"`),
      entry,
    );
  }
});

test("an entry without a slash at its end admits one repository alone", () => {
  assert.equal(isAllowed("busybox:1.36", ["library/busybox"]), true);
  assert.equal(isAllowed("busybox-evil", ["library/busybox"]), false);
  assert.equal(isAllowed("library/busybox/more", ["library/busybox"]), false);
});

test("an empty allowlist admits nothing", () => {
  assert.equal(isAllowed("busybox", []), false);
});

const part = fc.stringMatching(/^[a-z0-9]{1,8}([._-][a-z0-9]{1,8})?$/);
const registry = fc.constantFrom(
  "",
  "docker.io/",
  "index.docker.io/",
  "ghcr.io/",
  "localhost:5000/",
  "nvcr.io/",
  "r.example:8443/",
);
const reference = fc
  .tuple(
    registry,
    fc.array(part, { minLength: 1, maxLength: 4 }),
    fc.constantFrom("", ":v1", ":X.y_z-1"),
    fc.constantFrom("", `@${digest}`),
  )
  .map(([host, parts, tag, at]) => `${host}${parts.join("/")}${tag}${at}`);

test("a normalized reference parses to itself", () => {
  fc.assert(
    fc.property(reference, (text) => {
      const normalized = normalize(text);
      assert.ok(normalized !== undefined);
      assert.equal(normalize(normalized), normalized);
    }),
    { numRuns: 500 },
  );
});

test("no text is both admitted and outside the allowlist's registries and folders", () => {
  const pieces = fc.constantFrom(
    "pytorch",
    "evil",
    "library",
    "nvcr.io",
    "docker.io",
    "index.docker.io",
    "ghcr.io",
    "clodei",
    "..",
    ".",
    "/",
    ":",
    "@",
    "%2f",
    "A",
    "-",
    "_",
    digest,
    "localhost",
    ":5000",
  );
  fc.assert(
    fc.property(
      fc.array(pieces, { maxLength: 9 }).map((all) => all.join("")),
      (text) => {
        if (!isAllowed(text)) return;
        const normalized = normalize(text) ?? "";
        assert.match(
          normalized,
          /^(docker\.io\/(aitorgarmen|library|pytorch|nvidia|tensorflow)|ghcr\.io\/clodei|nvcr\.io)\/[a-z0-9]/,
        );
        const name = normalized.split(/[:@]/)[0] ?? "";
        assert.ok(!/\.\.|%|\/\//.test(name), normalized);
      },
    ),
    { numRuns: 5000 },
  );
});

test("any text whatsoever is refused or normalized, and never throws", () => {
  fc.assert(fc.property(fc.string({ unit: "binary" }), (text) => void normalize(text)));
});

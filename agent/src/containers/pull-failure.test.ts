import assert from "node:assert/strict";
import { test } from "node:test";
import { parseImageReference } from "@clodei/proto/image-reference";
import { EngineError } from "./engine-error.ts";
import { pullError } from "./pull-failure.ts";
import { PullRefusal } from "./pull-progress.ts";

const digest = `sha256:${"429".padEnd(64, "0")}`;
const address = "127.0.0.1:5000";
/** Its name is made of words that are looked for. */
const name = "denied/json-timeout";

function kindOf(words: string): string {
  const reference = parseImageReference(`${address}/${name}:closed`);
  assert.ok(reference);
  const error = pullError(new PullRefusal(words), reference);
  assert.ok(error instanceof EngineError, words);
  assert.ok(error.message.includes(`${name}:closed`), error.message);
  return error.kind;
}

test("what Docker says of a pull is told apart, whatever names and digests are in it", () => {
  const said = [
    [`filesystem layer verification failed for digest ${digest}`, "damaged"],
    [`manifest verification failed for digest ${digest}`, "damaged"],
    ["invalid character 'x' looking for beginning of value", "damaged"],
    ["unknown blob", "damaged"],
    [
      `error parsing HTTP 502 response body: invalid character '<' looking for beginning of value: "<html>denied EOF</html>"`,
      "pull_failed",
    ],
    [
      `error parsing HTTP 403 response body: invalid character '<' looking for beginning of value: "<html>gone</html>"`,
      "unauthorized",
    ],
    [
      `Get "http://${address}/v2/${name}/blobs/${digest}": dial tcp ${address}: connect: connection refused`,
      "unreachable",
    ],
    ['Get "https://registry.invalid/v2/": dial tcp: lookup registry.invalid: no such host', "unreachable"],
    [`read tcp 127.0.0.1:54290->${address}: read: connection reset by peer`, "interrupted"],
    [`Get "http://${address}/v2/${name}/blobs/${digest}": EOF`, "interrupted"],
    ["unexpected EOF", "interrupted"],
    [`manifest for ${address}/${name}:closed not found: manifest unknown: manifest unknown`, "image_not_found"],
    [`Head "http://${address}/v2/${name}/manifests/closed": no basic auth credentials`, "unauthorized"],
    ["toomanyrequests: You have reached your pull rate limit", "pull_failed"],
    ["failed to register layer: write /usr/lib/x: no space left on device", "pull_failed"],
    [`Get "https://${address}/v2/": x509: certificate signed by unknown authority`, "pull_failed"],
    ["failed to register layer: mkdir /usr: permission denied", "pull_failed"],
    ["denied: requested access to the resource is denied", "unauthorized"],
    ["something that nobody has ever seen", "pull_failed"],
  ] as const;
  for (const [words, kind] of said) assert.equal(kindOf(words), kind, words);
});

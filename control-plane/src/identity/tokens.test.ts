import "reflect-metadata"; // before @peculiar/x509, which needs it at import
import assert from "node:assert/strict";
import { createHmac } from "node:crypto";
import { createServer } from "node:https";
import type { AddressInfo } from "node:net";
import { afterEach, beforeEach, describe, test } from "node:test";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import * as x509 from "@peculiar/x509";
import { generateKeyPair, SignJWT } from "jose";
import { DomainError } from "../platform/errors.ts";
import { createLog } from "../platform/log.ts";
import { parseJwtIssuers } from "./issuers.ts";
import { startTestIssuer, type TestIssuer, testAudience } from "./test-issuer.ts";
import { TokenVerifier } from "./tokens.ts";

const keysPath = "/.well-known/jwks.json";
const minuteMs = 60_000;

let nowMs = Date.now();
const clock = (): Date => new Date(nowMs);
let issuer: TestIssuer;
beforeEach(async () => {
  issuer = await startTestIssuer(clock);
});
afterEach(() => issuer[Symbol.asyncDispose]());

const verifier = (extra: Record<string, unknown> = {}): TokenVerifier =>
  new TokenVerifier({ issuers: [issuer.configuration(extra)], clock, log: createLog("silent") });

function refused(reason: ErrorReason, token: string) {
  return (error: unknown): boolean => {
    assert.ok(error instanceof DomainError, String(error));
    assert.equal(error.reason, reason);
    assert.ok(!error.message.includes(token));
    return true;
  };
}

describe("tokens", () => {
  test("of the issuer for our audience are accepted", async () => {
    const exp = Math.floor(nowMs / 1000) + 600;
    const verified = await verifier().verify(await issuer.token({ sub: "somebody", exp }));
    const expireTime = new Date((exp + 30) * 1000);
    assert.deepEqual(verified, { issuer: issuer.issuer, subject: "somebody", emailVerified: false, expireTime });
    assert.ok(await verifier().verify(await issuer.token({ aud: ["other", testAudience] })));
  });

  test("that are expired, not valid yet, of another issuer or audience, or without a claim that counts are refused", async () => {
    const tokens = verifier();
    const seconds = Math.floor(nowMs / 1000);
    const changes: Record<string, Record<string, unknown>> = {
      expired: { exp: seconds - 31 },
      "not yet valid": { nbf: seconds + 60 },
      "issued in the future without end": { exp: undefined },
      "of another issuer": { iss: "https://evil.example" },
      "of no issuer": { iss: undefined },
      "for another audience": { aud: "another" },
      "for no audience": { aud: undefined },
      "without a subject": { sub: undefined },
      "with an empty subject": { sub: "" },
      "with a long subject": { sub: "x".repeat(256) },
    };
    for (const [what, claims] of Object.entries(changes)) {
      const token = await issuer.token(claims);
      await assert.rejects(tokens.verify(token), refused(ErrorReason.TOKEN_INVALID, token), what);
    }
  });

  test("may be off by half a minute, because clocks are", async () => {
    const seconds = Math.floor(nowMs / 1000);
    assert.ok(await verifier().verify(await issuer.token({ exp: seconds - 20, nbf: seconds + 20 })));
  });

  test("with the algorithm none, with HS256 by the public key, and with RS256 are refused", async () => {
    const tokens = verifier();
    const good = await issuer.token();
    const [, payload = ""] = good.split(".");
    const encode = (value: object): string => Buffer.from(JSON.stringify(value)).toString("base64url");
    const none = `${encode({ alg: "none", typ: "JWT" })}.${payload}.`;
    const head = `${encode({ alg: "HS256", kid: "key-1", typ: "JWT" })}.${payload}`;
    const keys = await (await fetch(`${issuer.issuer}${keysPath}`)).text();
    const symmetric = `${head}.${createHmac("sha256", keys).update(head).digest("base64url")}`;
    const { privateKey } = await generateKeyPair("RS256");
    const rsa = await new SignJWT({ iss: issuer.issuer, aud: testAudience, sub: "user-1" })
      .setProtectedHeader({ alg: "RS256", kid: "key-1" })
      .setIssuedAt(clock())
      .setExpirationTime(new Date(nowMs + minuteMs))
      .sign(privateKey);
    for (const token of [none, symmetric, rsa]) {
      await assert.rejects(tokens.verify(token), refused(ErrorReason.TOKEN_INVALID, token));
    }
  });

  test("that were tampered with, signed by another key under a known name, or are no tokens are refused", async () => {
    const tokens = verifier();
    const token = await issuer.token();
    const [header = "", , signature = ""] = token.split(".");
    const forgedPayload = Buffer.from(
      JSON.stringify({ iss: issuer.issuer, aud: testAudience, sub: "admin", iat: 1, exp: 9e9 }),
    );
    const forged = `${header}.${forgedPayload.toString("base64url")}.${signature}`;
    const before = token;
    await issuer.rotate();
    const otherKeySameName = await issuer.token({}, { kid: "key-1" });
    await issuer.rotate();
    for (const bad of [forged, otherKeySameName, before, "a.b.c", "", "nonsense", "x".repeat(10_000)]) {
      await assert.rejects(tokens.verify(bad), refused(ErrorReason.TOKEN_INVALID, bad === "" ? "?" : bad));
    }
  });

  test("of one issuer are not accepted for another, though both are configured", async () => {
    await using other = await startTestIssuer(clock);
    const tokens = new TokenVerifier({
      issuers: [issuer.configuration(), other.configuration()],
      clock,
      log: createLog("silent"),
    });
    assert.equal((await tokens.verify(await other.token())).issuer, other.issuer);
    const crossed = await other.token({ iss: issuer.issuer });
    await assert.rejects(tokens.verify(crossed), refused(ErrorReason.TOKEN_INVALID, crossed));
  });
});

describe("key sets", () => {
  test("are fetched once, however many tokens come at once", async () => {
    const tokens = verifier();
    const token = await issuer.token();
    await Promise.all(Array.from({ length: 20 }, () => tokens.verify(token)));
    nowMs += 9 * minuteMs;
    await tokens.verify(await issuer.token());
    assert.equal(issuer.requests.get(keysPath), 1);
  });

  test("are fetched again for a new key, so a rotation needs no restart, and the old key is refused", async () => {
    const tokens = verifier();
    const old = await issuer.token();
    await tokens.verify(old);
    nowMs += minuteMs;
    await issuer.rotate();
    assert.ok(await tokens.verify(await issuer.token()));
    await assert.rejects(tokens.verify(old), refused(ErrorReason.TOKEN_INVALID, old));
  });

  test("are not fetched for every token with a made-up key", async () => {
    const tokens = verifier();
    await tokens.verify(await issuer.token());
    nowMs += minuteMs;
    for (let index = 0; index < 20; index += 1) {
      const token = await issuer.token({}, { kid: `made-up-${index}` });
      await assert.rejects(tokens.verify(token), refused(ErrorReason.TOKEN_INVALID, token));
    }
    assert.equal(issuer.requests.get(keysPath), 2);
  });

  test("that cannot be had make the server unavailable and no token invalid, without a storm of requests", async () => {
    const tokens = verifier();
    const token = await issuer.token();
    for (const keysAnswer of [
      { status: 500, body: "" },
      { status: 302, body: "" },
      { status: 200, body: "<html>" },
      { status: 200, body: JSON.stringify({ keys: "none" }) },
      { status: 200, body: " ".repeat(300 * 1024) },
    ]) {
      nowMs += minuteMs;
      issuer.keysAnswer = keysAnswer;
      const before = issuer.requests.get(keysPath) ?? 0;
      for (let round = 0; round < 3; round += 1) {
        await assert.rejects(tokens.verify(token), refused(ErrorReason.UNAVAILABLE, token));
      }
      assert.equal(issuer.requests.get(keysPath), before + 1);
    }
    assert.equal(issuer.requests.get("/elsewhere"), undefined, "no redirect is followed");
    nowMs += minuteMs;
    issuer.keysAnswer = undefined;
    assert.ok(await tokens.verify(token));
  });

  test("outlive an outage of the issuer for an hour, and not for longer", async () => {
    const tokens = verifier();
    const token = await issuer.token({ exp: Math.floor(nowMs / 1000) + 7200 });
    await tokens.verify(token);
    issuer.keysAnswer = { status: 503, body: "" };
    nowMs += 30 * minuteMs;
    assert.ok(await tokens.verify(token));
    nowMs += 31 * minuteMs;
    await assert.rejects(tokens.verify(token), refused(ErrorReason.UNAVAILABLE, token));
  });
});

describe("an issuer over https", () => {
  test("whose certificate nobody vouches for gets no connection", async () => {
    let asked = 0;
    const server = createServer(await selfSigned(), (_request, response) => {
      asked += 1;
      response.end("{}");
    });
    await new Promise<void>((resolve) => {
      server.listen(0, "127.0.0.1", resolve);
    });
    const { port } = server.address() as AddressInfo;
    try {
      const tokens = verifier({ jwksUrl: `https://localhost:${port}/keys` });
      const token = await issuer.token();
      await assert.rejects(tokens.verify(token), refused(ErrorReason.UNAVAILABLE, token));
      assert.equal(asked, 0);
    } finally {
      server.close();
    }
  });
});

async function selfSigned(): Promise<{ cert: string; key: string }> {
  const algorithm = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" };
  const keys = await globalThis.crypto.subtle.generateKey(algorithm, true, ["sign", "verify"]);
  const certificate = await x509.X509CertificateGenerator.createSelfSigned({
    name: "CN=localhost",
    keys,
    signingAlgorithm: algorithm,
    extensions: [new x509.SubjectAlternativeNameExtension([{ type: "dns", value: "localhost" }])],
  });
  const key = await globalThis.crypto.subtle.exportKey("pkcs8", keys.privateKey);
  return { cert: certificate.toString("pem"), key: x509.PemConverter.encode(key, "PRIVATE KEY") };
}

describe("verified e-mail", () => {
  const verified = async (tokens: TokenVerifier, claims: object = {}): Promise<boolean> =>
    (await tokens.verify(await issuer.token({ ...claims }))).emailVerified;

  test("comes from the configured claim and from nothing that a user writes", async () => {
    const tokens = verifier({ emailVerifiedClaim: "app_metadata.email_verified" });
    assert.equal(await verified(tokens, { app_metadata: { email_verified: true } }), true);
    assert.equal(await verified(tokens, { app_metadata: { email_verified: "true" } }), false);
    assert.equal(await verified(tokens, { email_verified: true, user_metadata: { email_verified: true } }), false);
    assert.equal(await verified(verifier(), { email_verified: true }), false, "nothing configured");
  });

  test("comes from the user endpoint where no claim is configured, and is believed for ten minutes", async () => {
    const tokens = verifier({ userEndpoint: `${issuer.issuer}/user` });
    issuer.user = { id: "user-1", email_confirmed_at: "2026-01-01T00:00:00Z" };
    assert.equal(await verified(tokens), true);
    assert.match(issuer.lastAuthorization() ?? "", /^Bearer ey/);
    nowMs += 9 * minuteMs;
    assert.equal(await verified(tokens), true);
    assert.equal(issuer.requests.get("/user"), 1);
    nowMs += 2 * minuteMs;
    issuer.user = { id: "user-1", email_confirmed_at: null };
    assert.equal(await verified(tokens), false);
    nowMs += minuteMs;
    issuer.user = { sub: "user-1", email_verified: true };
    assert.equal(await verified(tokens), true, "not verified is asked again soon");
  });

  test("is not taken from another user's answer, from user_metadata, or from an endpoint that fails", async () => {
    for (const user of [
      { id: "user-2", email_confirmed_at: "2026-01-01T00:00:00Z" },
      { email_confirmed_at: "2026-01-01T00:00:00Z" },
      { id: "user-1", user_metadata: { email_verified: true } },
      { id: "user-1", email_verified: "true" },
      { id: "user-1", email_confirmed_at: "" },
      null,
      "user-1",
    ]) {
      issuer.user = user;
      assert.equal(await verified(verifier({ userEndpoint: `${issuer.issuer}/user` })), false, JSON.stringify(user));
    }
    assert.equal(await verified(verifier({ userEndpoint: "http://127.0.0.1:1/user" })), false);
  });
});

describe("the configuration of issuers", () => {
  const good = { issuer: "https://id.example", audience: "a" };
  const parse = (entry: object) => parseJwtIssuers(JSON.stringify([entry]));

  test("takes https anywhere, http on loopback, and knows where keys are by default", () => {
    assert.equal(parse(good)[0]?.jwksUrl.href, "https://id.example/.well-known/jwks.json");
    for (const issuer of ["http://127.0.0.1:9", "http://localhost:9/auth", "http://[::1]:9"]) {
      assert.equal(parse({ ...good, issuer })[0]?.issuer, issuer);
    }
  });

  test("refuses by name what is unsafe or unclear", () => {
    const cases: [object, RegExp][] = [
      [{ ...good, issuer: "http://id.example" }, /issuer must be https/],
      [{ ...good, issuer: "http://127.0.0.1.evil.example" }, /issuer must be https/],
      [{ ...good, jwksUrl: "http://10.0.0.1/keys" }, /jwksUrl must be https/],
      [{ ...good, jwksUrl: "file:///etc/keys" }, /jwksUrl must be https/],
      [{ ...good, userEndpoint: "ftp://id.example" }, /userEndpoint must be https/],
      [{ ...good, issuer: "https://user:secret@id.example" }, /no credentials/],
      [{ ...good, audience: undefined }, /audience/],
      [{ ...good, audience: [] }, /audience/],
      [{ ...good, emailVerifiedClaim: "user_metadata.email_verified" }, /users edit/],
      [{ ...good, emailVerifiedClaim: "x.raw_user_meta_data.y" }, /users edit/],
      [
        { ...good, userEndpointHeaders: { Authorization: "x" }, userEndpoint: "https://id.example/u" },
        /without authorization/,
      ],
      [{ ...good, algorithms: ["none"] }, /unknown field "algorithms"/],
    ];
    for (const [entry, message] of cases) assert.throws(() => parse(entry), message);
    assert.throws(() => parseJwtIssuers("{"), /no JSON/);
    assert.throws(() => parseJwtIssuers("{}"), /list/);
    assert.throws(() => parseJwtIssuers(JSON.stringify([good, good])), /twice/);
  });
});

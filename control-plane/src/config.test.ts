import assert from "node:assert/strict";
import { test } from "node:test";
import { ConfigError, configFlags, configHelp, loadConfig } from "./config.ts";

function problemsOf(environment: Record<string, string>, flags: Record<string, string> = {}): string {
  try {
    loadConfig({ environment, flags });
  } catch (error) {
    assert.ok(error instanceof ConfigError);
    return error.message;
  }
  return "";
}

test("nothing set is a configuration for one machine, on loopback", () => {
  const config = loadConfig({ environment: {} });
  assert.deepEqual(
    [config.publicPort, config.nodePort, config.operationsPort, config.publicHost, config.databaseUrl],
    [8443, 8444, 9464, "127.0.0.1", ""],
  );
  assert.deepEqual(
    [config.heartbeatIntervalMs, config.leaseMs, config.pollIntervalMs, config.drainMs],
    [10_000, 30_000, 1_000, 25_000],
  );
  assert.ok(config.allowedCountries.includes("ES") && config.allowedCountries.includes("NO"));
  assert.ok(!config.allowedCountries.includes("US"));
});

test("a flag wins over its variable", () => {
  const config = loadConfig({ environment: { CLODEI_PUBLIC_PORT: "1" }, flags: { "--public-port": "2" } });
  assert.equal(config.publicPort, 2);
  assert.equal(loadConfig({ environment: { CLODEI_PUBLIC_PORT: "1" } }).publicPort, 1);
});

test("every problem is told, each with its setting", () => {
  const problems = problemsOf({ CLODEI_PUBLIC_PORT: "70000", CLODEI_LEASE_MS: "soon", CLODEI_ALLOWED_COUNTRIES: "es" });
  for (const name of ["CLODEI_PUBLIC_PORT", "CLODEI_LEASE_MS", "CLODEI_ALLOWED_COUNTRIES"])
    assert.match(problems, new RegExp(name));
});

test("other control planes are told an address that leads here", () => {
  for (const host of ["0.0.0.0", "::", "0:0::0", "::ffff:0.0.0.0"]) {
    assert.match(problemsOf({ CLODEI_REPLICA_HOST: host }), /^CLODEI_REPLICA_ENDPOINT: give host:port .*every address/);
    const given = { CLODEI_REPLICA_HOST: host, CLODEI_REPLICA_ENDPOINT: "10.0.0.7:8445" };
    assert.equal(loadConfig({ environment: given }).replicaEndpoint, "10.0.0.7:8445");
  }
  assert.match(problemsOf({ CLODEI_REPLICA_ENDPOINT: "10.0.0.7:8445" }), /has no use without CLODEI_REPLICA_HOST/);
  for (const endpoint of ["here", "host:0", "host:70000", "1.2.3.999:8445", "[1:2]:3"]) {
    assert.match(
      problemsOf({}, { "--replica-endpoint": endpoint }),
      /--replica-endpoint .*must be host:port/,
      endpoint,
    );
  }
  const config = loadConfig({ environment: { CLODEI_REPLICA_HOST: "10.0.0.7" } });
  assert.deepEqual([config.replicaHost, config.replicaPort, config.replicaEndpoint], ["10.0.0.7", 8445, ""]);
  assert.equal(loadConfig({ environment: {} }).replicaHost, "");
});

test("what lets proxies speak for others, or in plain text, says which proxies those are", () => {
  assert.match(problemsOf({ CLODEI_PUBLIC_TLS: "off" }), /CLODEI_PUBLIC_TLS: off needs TRUSTED_PROXIES/);
  assert.match(
    problemsOf({ CLODEI_NODE_PROXY_PROTOCOL: "on" }),
    /CLODEI_NODE_PROXY_PROTOCOL: on needs TRUSTED_PROXIES/,
  );
  assert.match(problemsOf({ CLODEI_PUBLIC_TLS: "maybe" }), /CLODEI_PUBLIC_TLS.*must be on or off/);
  assert.match(problemsOf({ TRUSTED_PROXIES: "proxy.example" }), /TRUSTED_PROXIES.*"proxy.example"/);
  assert.match(problemsOf({ TRUSTED_PROXIES: "10.0.0.0/8,0.0.0.0/0" }), /TRUSTED_PROXIES.*would trust everybody/);
  const behind = { TRUSTED_PROXIES: "10.0.0.0/8, ::1", CLODEI_PUBLIC_TLS: "off", CLODEI_NODE_PROXY_PROTOCOL: "on" };
  const config = loadConfig({ environment: behind });
  assert.deepEqual(
    [config.trustedProxies, config.publicTls, config.nodeProxyProtocol],
    [["10.0.0.0/8", "::1"], false, true],
  );
  const certificate = { CLODEI_PUBLIC_CERTIFICATE_FILE: "/c.pem", CLODEI_PUBLIC_KEY_FILE: "/k.pem" };
  assert.match(problemsOf({ ...behind, ...certificate }), /CLODEI_PUBLIC_CERTIFICATE_FILE: has no use/);
  const nothing = loadConfig({ environment: {} });
  assert.deepEqual([nothing.trustedProxies, nothing.publicTls, nothing.nodeProxyProtocol], [[], true, false]);
});

test("an issuer without https is refused, but on loopback", () => {
  const issuer = (url: string): string =>
    JSON.stringify([{ issuer: url, audience: "a", jwksUrl: `${url}/jwks.json`, emailVerifiedClaim: "email_verified" }]);
  assert.match(problemsOf({ CLODEI_JWT_ISSUERS: issuer("http://id.example") }), /CLODEI_JWT_ISSUERS/);
  assert.equal(problemsOf({ CLODEI_JWT_ISSUERS: issuer("https://id.example") }), "");
  assert.equal(problemsOf({ CLODEI_JWT_ISSUERS: issuer("http://127.0.0.1:9999") }), "");
  assert.match(problemsOf({ CLODEI_JWT_ISSUERS: "no" }), /CLODEI_JWT_ISSUERS/);
});

test("a database off this machine needs a CA, and no parameter can loosen its verification", () => {
  const urls = (suffix: string, host = "db.example"): Record<string, string> => ({
    DATABASE_URL: `postgres://clodei_app:p@${host}/clodei${suffix}`,
    DATABASE_SYSTEM_URL: `postgres://clodei_system:p@${host}/clodei${suffix}`,
  });
  assert.match(problemsOf(urls("")), /DATABASE_URL: .*CLODEI_DATABASE_CA_FILE/);
  assert.equal(problemsOf({ ...urls(""), CLODEI_DATABASE_CA_FILE: "/ca.pem" }), "");
  for (const mode of ["disable", "prefer", "require", "no-verify", "verify-ca"]) {
    assert.match(problemsOf({ ...urls(`?sslmode=${mode}`), CLODEI_DATABASE_CA_FILE: "/ca.pem" }), /sslmode/, mode);
  }
  assert.equal(problemsOf(urls("", "127.0.0.1:5432")), "");
  assert.equal(problemsOf(urls("?host=/run/postgresql", "")), "");
  // A host that only looks like this machine, and a parameter that moves it away.
  assert.match(problemsOf(urls("", "127.0.0.1.example")), /CA/);
  assert.match(problemsOf(urls("?host=db.example", "127.0.0.1")), /CA/);
  assert.match(problemsOf(urls("?host=/run/postgresql&host=db.example", "")), /CA/);
});

test("nothing switches the verification of TLS off for the whole process", () => {
  assert.match(
    problemsOf({ NODE_TLS_REJECT_UNAUTHORIZED: "0" }),
    /^NODE_TLS_REJECT_UNAUTHORIZED: .*NODE_EXTRA_CA_CERTS$/,
  );
  assert.equal(problemsOf({ NODE_TLS_REJECT_UNAUTHORIZED: "1" }), "");
});

test("settings that belong together come together", () => {
  assert.match(problemsOf({ DATABASE_URL: "postgres://clodei_app:p@127.0.0.1/c" }), /DATABASE_SYSTEM_URL/);
  assert.match(problemsOf({ CLODEI_CA_KEY_FILE: "/key.pem" }), /CLODEI_CA_CERTIFICATE_FILE/);
  assert.match(problemsOf({ CLODEI_PUBLIC_KEY_FILE: "/key.pem" }), /CLODEI_PUBLIC_CERTIFICATE_FILE/);
  assert.match(problemsOf({ CLODEI_LEASE_MS: "15000" }), /CLODEI_HEARTBEAT_INTERVAL_MS/);
  assert.match(problemsOf({ CLODEI_PUBLIC_NAMES: "," }), /CLODEI_PUBLIC_NAMES/);
});

test("an origin is exact and https, and there is no wildcard", () => {
  for (const origin of [
    "*",
    "http://console.example",
    "https://console.example/",
    "https://*.example",
    "console.example",
    "null",
  ]) {
    assert.match(problemsOf({ CLODEI_CORS_ORIGINS: origin }), /CLODEI_CORS_ORIGINS/, origin);
  }
  assert.equal(problemsOf({ CLODEI_CORS_ORIGINS: "https://console.example,http://localhost:5173" }), "");
});

test("the help names every setting, and no flag carries a secret", () => {
  const help = configHelp();
  for (const flag of configFlags) assert.ok(help.includes(flag), flag);
  assert.ok(help.includes("DATABASE_URL"));
  assert.ok(configFlags.every((flag) => !/database-url|jwt/.test(flag)));
});

import assert from "node:assert/strict";
import { test } from "node:test";
import { euAndEeaCountries, isCountryAllowed } from "./locations.ts";

test("the default is the 27 of the Union and the 3 others of the EEA, each once", () => {
  assert.equal(euAndEeaCountries.length, 30);
  assert.equal(new Set(euAndEeaCountries).size, 30);
  for (const country of euAndEeaCountries) assert.match(country, /^[A-Z]{2}$/);
});

test("Spain and Norway are allowed by default, and the United Kingdom, Switzerland and the United States are not", () => {
  for (const country of ["ES", "NO", "GR"]) assert.equal(isCountryAllowed(country, euAndEeaCountries), true);
  for (const country of ["GB", "CH", "US", "RU", "EL", "XX"]) {
    assert.equal(isCountryAllowed(country, euAndEeaCountries), false);
  }
});

test("other spellings of an allowed country are not allowed", () => {
  for (const country of ["es", "ES ", "", "ESP"]) assert.equal(isCountryAllowed(country, euAndEeaCountries), false);
});

test("a configured list takes the place of the default", () => {
  assert.equal(isCountryAllowed("CH", ["CH"]), true);
  assert.equal(isCountryAllowed("ES", ["CH"]), false);
});

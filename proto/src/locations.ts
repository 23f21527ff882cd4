/** Where data may be: the countries that a node may stand in. */

/** The 27 members of the European Union. Territories with a country code of their own are not among them. */
const euCountries = "AT BE BG CY CZ DE DK EE ES FI FR GR HR HU IE IT LT LU LV MT NL PL PT RO SE SI SK".split(" ");

/** The members of the European Economic Area that are not in the Union: Iceland, Liechtenstein, Norway. */
const eeaOnlyCountries = ["IS", "LI", "NO"];

/** EU and EEA as ISO 3166-1 alpha-2: the jurisdictions that are allowed by default, where the GDPR binds. */
export const euAndEeaCountries: readonly string[] = [...euCountries, ...eeaOnlyCountries];

/**
 * Whether a node may stand in this country. Codes are compared as they are: "es" and "EL" (the Union's own code
 * for Greece) are not codes of ISO 3166-1.
 */
export function isCountryAllowed(country: string, allowed: readonly string[]): boolean {
  return allowed.includes(country);
}

"""Places named more exactly than necessary: "Ottawa, Ontario" says Ottawa.

"Ottawa, Toronto" would name two cities. Telling them apart needs knowledge, so the regions that
follow a city's name in English are listed: states and provinces of the United States, Canada and
Australia, parts of the United Kingdom, and any name with a word such as Province. Those that are
cities as well (New York, Washington, Victoria) are left out. labels.py allows for a country that
the question names.
"""

from __future__ import annotations

import re

_STATES = (
    "Alabama|Alaska|Arizona|Arkansas|California|Colorado|Connecticut|Delaware|Florida|Georgia|"
    "Hawaii|Idaho|Illinois|Indiana|Iowa|Kansas|Kentucky|Louisiana|Maine|Maryland|Massachusetts|"
    "Michigan|Minnesota|Mississippi|Missouri|Montana|Nebraska|Nevada|New Hampshire|New Jersey|"
    "New Mexico|North Carolina|North Dakota|Ohio|Oklahoma|Oregon|Pennsylvania|Rhode Island|"
    "South Carolina|South Dakota|Tennessee|Texas|Utah|Vermont|Virginia|West Virginia|Wisconsin|"
    "Wyoming|District of Columbia|D\\.?C\\.?|Ontario|Quebec|Québec|Nova Scotia|New Brunswick|"
    "Manitoba|British Columbia|Prince Edward Island|Saskatchewan|Alberta|"
    "Newfoundland(?: and Labrador)?|Yukon|Nunavut|Northwest Territories|New South Wales|"
    "Queensland|South Australia|Tasmania|Western Australia|Northern Territory|"
    "Australian Capital Territory|ACT|England|Scotland|Wales|Northern Ireland"
)
_COUNTRIES = (
    "Canada|United States(?: of America)?|U\\.?S\\.?A?\\.?|United Kingdom|U\\.?K\\.?|Australia|"
    "New Zealand|Japan|China|India|France|Germany|Italy|Spain|Egypt|Brazil|Mexico|Russia|"
    "South Korea|Turkey|Argentina|South Africa"
)
_KIND = r"(?:Province|Prefecture|Region|State|County|Governorate|District|Territory|Oblast)"
_REGION = (
    r"(?:the\s++)?(?:(?:state|province|prefecture|region)\s++of\s++)?"
    rf"(?:{_STATES}|{_COUNTRIES}|[A-Z]\w++\s++{_KIND})(?![\w-])"
)
_AFTER = re.compile(
    rf"(?<!\s)\s*+(?:(?:,\s*+(?:in\b\s*+)?|\bin\b\s*+){_REGION}(?:\s*+,\s*+{_REGION})?"
    rf"|\((?:in\s++)?{_REGION}\))"
)
_GOES_ON = re.compile(r"(?<!\s)\s*+(?:,\s*+(?:and\s++|or\s++)?[A-Z]|/|\bor\b|\band\s++[A-Z])")


def without_region(text: str, place: re.Pattern[str]) -> str:
    """`text` without the regions that directly follow the expected `place`.

    A list stays a list: nothing is removed where more names follow ("Ottawa, Ontario, Toronto").
    """
    for match in reversed(list(place.finditer(text))):
        region = _AFTER.match(text, match.end())
        if region and not _GOES_ON.match(text, region.end()):
            text = text[: match.end()] + text[region.end() :]
    return text

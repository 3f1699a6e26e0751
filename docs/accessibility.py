"""Read the built site as axe-core does, in a headless Chromium, in the light and in the dark scheme.

    npm pack axe-core && tar xzf axe-core-*.tgz            # package/axe.min.js
    python docs/accessibility.py package/axe.min.js [--site site] [PAGE ...]

Each page is copied beside itself with axe in it, opened, and removed. Prints a line for each rule that a page breaks
(WCAG 2.1 A and AA, and best practice: headings in order, texts for pictures, contrast, names of links) with the place,
and ends with 1 if there is one. Chromium comes from the system: on Debian, `apt install chromium`.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCHEMES = {"light": 1, "dark": 0}
"""What a reader prefers, as Chromium counts it."""
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]
RUN = """
<script src="{axe}"></script>
<script>
addEventListener("load", async () => {{
  await new Promise(done => setTimeout(done, 1000));  // transitions of colors
  const result = await axe.run({{ exclude: [] }}, {{ runOnly: {tags}, resultTypes: ["violations"] }});
  const found = result.violations.map(v => [v.id, v.help, v.nodes.map(n => n.target.join(" "))]);
  const place = document.createElement("pre");
  place.id = "axe-found";
  place.textContent = JSON.stringify(found);
  document.body.append(place);
}});
</script>
"""


def violations(page: Path, axe: Path, chromium: str, scheme: int) -> list[tuple[str, str, list[str]]]:
    """The rules that are broken, their sentences, and the places that break them."""
    run = RUN.format(axe=axe.resolve().as_uri(), tags=json.dumps(TAGS))
    copy = page.with_name(f".axe-{page.name}")
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", run + "</body>"), encoding="utf-8")
    try:
        line = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
                f"--blink-settings=preferredColorScheme={scheme}", "--virtual-time-budget=30000",
                "--window-size=1280,900", "--dump-dom", copy.as_uri()]  # fmt: skip
        done = subprocess.run(line, capture_output=True, text=True, timeout=180)
    finally:
        copy.unlink()
    found = re.search(r'<pre id="axe-found">(.*?)</pre>', done.stdout, re.S)
    if found is None:
        raise SystemExit(f"{page}: Chromium gave no result: {done.stderr.strip()[-300:]}")
    return [(rule, sentence, places) for rule, sentence, places in json.loads(html.unescape(found[1]))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axe", type=Path, help="axe.min.js of the npm package axe-core")
    parser.add_argument("pages", nargs="*", help="such as llm or concepts/criteria; by default all but the API")
    parser.add_argument("--site", type=Path, default=ROOT / "site")
    asked = parser.parse_intermixed_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("there is no chromium: on Debian, apt install chromium")
    if not asked.axe.is_file() or not (asked.site / "index.html").is_file():
        parser.error("axe.min.js is missing, or the site: npm pack axe-core, and make docs")
    chosen = [asked.site / name / "index.html" for name in asked.pages] or [
        page for page in sorted(asked.site.rglob("index.html")) if "api" not in page.relative_to(asked.site).parts
    ]
    broken = 0
    for page in chosen:
        name = page.parent.relative_to(asked.site).as_posix()
        for scheme, number in SCHEMES.items():
            for rule, sentence, places in violations(page, asked.axe, chromium, number):
                broken += 1
                print(f"{name} ({scheme}): {rule}: {sentence}: {len(places)} places, such as {places[0]}", flush=True)
    print(f"{len(chosen)} pages in {len(SCHEMES)} schemes, {broken} rules broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

"""How the pages look: one sheet, light and dark, narrow and wide."""

SHEET = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1d2129; --soft: #5a6170; --line: #d5d8de; --link: #0b57b0;
  --focus: #b3470a; --bar: #2f6fb8; --open: #9a5b00; --good: #1b6e35; --bad: #b3261e; --code: #f1f2f4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171c; --card: #1b1f26; --ink: #e6e8ec; --soft: #a4acba; --line: #3a404b; --link: #8ab8ff;
    --focus: #ffb37a; --bar: #6ea8ea; --open: #f0b35a; --good: #7fd197; --bad: #ff9b92; --code: #232831;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
.skip { position: absolute; left: -100vw; top: 0; padding: .5rem 1rem; background: var(--card); z-index: 1; }
.skip:focus { left: 0; }
header { border-bottom: 1px solid var(--line); background: var(--card); padding: .6rem 1rem; display: flex;
  flex-wrap: wrap; gap: .2rem 1.5rem; align-items: baseline; }
header strong { overflow-wrap: anywhere; }
nav ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
nav a { display: inline-block; padding: .25rem 0; }
nav a[aria-current] { color: var(--ink); font-weight: 600; text-decoration-thickness: 2px; }
main { overflow-wrap: anywhere; padding: 1rem; max-width: 100rem; margin: 0 auto; }
main:focus { outline: none; }
h1 { font-size: 1.4rem; margin: .2rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 1.6rem 0 .5rem; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.scroll { position: relative; overflow-x: auto; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .4rem .7rem; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
td { overflow-wrap: anywhere; min-width: 6rem; }
td:first-child { min-width: 10rem; }
td.number, td.choose { min-width: 0; }
td:last-child:not(.number) { min-width: 14rem; }
td strong { white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
time, .keep { white-space: nowrap; }
td.bar { min-width: 12rem; width: 24%; }
svg.bar { display: block; width: 100%; height: 1.2rem; }
svg.bar rect { fill: var(--bar); }
svg.bar rect.open { fill: var(--open); }
svg.bar rect.bad { fill: var(--bad); }
.state { white-space: nowrap; font-weight: 600; }
.state::before { content: "\\25CF\\00A0"; }
.good { color: var(--good); } .bad { color: var(--bad); } .open { color: var(--open); } .soft { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--code); padding: .6rem .8rem; border-radius: 6px; overflow-x: auto; margin: .3rem 0;
  font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 32rem; overflow-y: auto; }
summary { cursor: pointer; }
form.filters { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: end; margin-bottom: 1rem; }
label { display: block; color: var(--soft); }
.wide { flex: 1 1 24rem; }
input:not([type=checkbox]), select, textarea, button { font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--soft); border-radius: 5px; padding: .35rem .6rem; width: 100%; min-height: 2.4rem; }
input[type=checkbox] { width: 1.3rem; height: 1.3rem; margin: 0; }
button { width: auto; cursor: pointer; color: var(--link); border-color: var(--link); font-weight: 600; }
.box { border: 1px solid var(--line); border-left: 5px solid var(--bar); border-radius: 6px; background: var(--card);
  padding: .6rem .9rem; margin: 0 0 1rem; }
.box.bad { border-left-color: var(--bad); color: inherit; }
.act { display: grid; gap: .6rem; max-width: 40rem; margin: .6rem 0; justify-items: start; }
.act > div { width: 100%; }
input[type=checkbox] + label { display: inline; }
input[type=checkbox] { vertical-align: text-bottom; }
.more { display: flex; gap: 1.5rem; margin: 1rem 0; }
@media (max-width: 40rem) {
  dl { grid-template-columns: 6.5rem 1fr; gap: .3rem .7rem; }
  .filters > div, .filters .wide { flex: 1 1 100%; }
  table, tbody, tr, td { display: block; }
  thead { position: absolute; clip-path: inset(50%); }
  tr { padding: .5rem 0; border-bottom: 1px solid var(--line); }
  tr:last-child { border-bottom: 0; }
  td, td.number, td.bar { border: 0; padding: .15rem .7rem .15rem 7.5rem; position: relative; text-align: left;
    width: auto; min-width: 0; min-height: 1.8em; white-space: normal; }
  td::before { content: attr(data-name); position: absolute; left: .7rem; width: 6.5rem; color: var(--soft); }
  td:empty { display: none; }
  td strong, time { white-space: normal; }
}
"""

ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#2f6fb8"/>'
    '<path d="M3 5h7M5 8h8M3 11h5" stroke="#fff" stroke-width="2"/></svg>'
)

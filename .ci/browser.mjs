// Open every page of the built site in Chromium, wide and as narrow as a phone, and look for what a reader would stumble over:
// node .ci/browser.mjs [folder of screenshots]. CHROMIUM is the browser (default: /usr/bin/chromium).
import assert from 'node:assert/strict'
import { createServer } from 'node:http'
import { mkdirSync, readdirSync, readFileSync } from 'node:fs'
import { dirname, extname, join, normalize } from 'node:path'
import { fileURLToPath } from 'node:url'
import { chromium } from 'playwright-core'

const site = join(dirname(fileURLToPath(import.meta.url)), '..', '_docs')
const shots = process.argv[2]
const types = {'.html': 'text/html', '.css': 'text/css', '.js': 'text/javascript', '.json': 'application/json', '.woff2': 'font/woff2'}

const server = createServer((request, response) => {
  const path = normalize(decodeURIComponent(new URL(request.url, 'http://site').pathname)).replace(/\/$/, '/index.html')
  try {
    const body = readFileSync(join(site, path))
    response.writeHead(200, {'Content-Type': types[extname(path)] ?? 'application/octet-stream'}).end(body)
  } catch { response.writeHead(path === '/favicon.ico' ? 204 : 404).end() }
})
await new Promise(done => server.listen(0, '127.0.0.1', done))
const root = `http://127.0.0.1:${server.address().port}/`

// What is asked of a page once it has loaded, in the browser
const look = () => ({
  scroll: document.documentElement.scrollWidth - window.innerWidth,
  unseen: [...document.images].filter(o => !(o.complete && o.naturalWidth > 0)).length,
  plots: document.querySelectorAll('.cell-output img').length,
  cut: [...document.querySelectorAll('pre')].filter(o => o.offsetParent && !(window.innerWidth < 600 && o.closest('.cell-output'))
    && [o, ...o.children].some(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0)).length,
  off: [...document.querySelectorAll('table tr:first-child th')].filter(o => o.textContent.trim() === 'fused'
    && (o.getBoundingClientRect().right > window.innerWidth || o.getBoundingClientRect().right > o.closest('table').parentElement.getBoundingClientRect().right + 1)).length,
  wide: [...document.querySelectorAll('table')].filter(o => window.innerWidth > 1000 && o.offsetParent && o.getBoundingClientRect().width > o.parentElement.getBoundingClientRect().width + 1).length,
  twice: [...document.querySelectorAll('[id]')].map(o => o.id).filter((o, i, all) => all.indexOf(o) !== i),
  tables: [...document.querySelectorAll('table')].filter(o => /Details/.test(o.rows[0]?.textContent) && o.rows.length > 1).length,
  maths: document.querySelectorAll('span.math').length,
  katex: document.querySelectorAll('span.math .katex').length,
  wrong: document.querySelectorAll('.katex-error').length,
})

const args = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
              '--disable-component-update', '--disable-sync']
const browser = await chromium.launch({executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', args})
const totals = {plots: 0, tables: 0, maths: 0}, problems = []
const pages = readdirSync(site).filter(o => o.endsWith('.html'))
if (shots) mkdirSync(shots, {recursive: true})
try {
  for (const [device, viewport] of [['desktop', {width: 1280, height: 900}], ['phone', {width: 390, height: 844}]]) {
    const context = await browser.newContext({viewport})
    for (const name of pages) {
      const page = await context.newPage(), wrong = what => problems.push(`${name} (${device}): ${what}`)
      page.on('console', o => { if (o.type() === 'error') wrong(`console: ${o.text()}`) })
      page.on('pageerror', o => wrong(`error: ${o.message}`))
      page.on('request', o => { if (!o.url().startsWith(root) && !o.url().startsWith('data:')) wrong(`asks for ${o.url()}`) })
      await page.goto(root + name, {waitUntil: 'load'})
      await page.waitForTimeout(200)
      const seen = await page.evaluate(look)
      if (seen.scroll > 0) wrong(`scrolls sideways by ${seen.scroll} pixels`)
      if (seen.unseen) wrong(`${seen.unseen} pictures do not show`)
      if (seen.cut) wrong(`${seen.cut} blocks of code are cut`)
      if (seen.wide) wrong(`${seen.wide} tables are wider than the page`)
      if (seen.off) wrong(`the column of fused is off the screen in ${seen.off} tables`)
      if (seen.twice.length) wrong(`ids are there twice: ${seen.twice}`)
      if (seen.katex !== seen.maths || seen.wrong) wrong(`${seen.maths} formulas, of which ${seen.katex} are set, ${seen.wrong} with errors`)
      for (const key in totals) totals[key] += seen[key]
      if (shots) await page.screenshot({path: join(shots, `${name.replace('.html', '')}.${device}.png`), fullPage: true})
      await page.close()
    }
    await context.close()
  }

  // Search: what a reader types leads to where it is documented
  const page = await browser.newPage({viewport: {width: 1280, height: 900}})
  await page.goto(root)
  await page.keyboard.press('/')
  await page.keyboard.type('adam', {delay: 50})
  const results = page.locator('[id*="search"] a[href*=".html"]')
  await results.first().waitFor({timeout: 5000})
  const found = await results.evaluateAll(links => links.map(o => o.getAttribute('href')))
  if (shots) await page.screenshot({path: join(shots, 'search.png')})
  assert(found.some(o => /#adam$/.test(o)), `search for adam finds ${found}`)
  const internals = [...readFileSync(join(site, '..', 'nbs', '_quarto.yml'), 'utf8').split('section: Internals')[1].matchAll(/([\w.]+)\.ipynb/g)].map(o => o[1] + '.html')
  const input = page.locator('.smalldocs-search input').first()
  for (const query of ['adam', 'learning rate', 'checkpoint', 'weight decay', 'momentum', 'fused', 'install', 'numba', 'profile', 'gpu']) {
    await input.fill(query)
    await page.waitForTimeout(200)
    const first = (await results.first().getAttribute('href', {timeout: 5000})).split('#')[0]
    if (internals.includes(first)) problems.push(`search for "${query}" finds ${first} first`)
  }
  await input.fill('adam')
  await page.waitForTimeout(200)
  await results.first().click()
  await page.waitForURL(/\.html/)
  for (const key in totals) assert(totals[key] > 0, `no page has any ${key}`)
} catch (error) { problems.push(String(error)) }
finally { await browser.close(); server.close() }

console.log([...problems, `${pages.length} pages: ${problems.length} problems, ${JSON.stringify(totals)}, wide and narrow together`].join('\n'))
process.exitCode = problems.length ? 1 : 0

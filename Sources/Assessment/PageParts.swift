/// The page's style and script. Neither holds anything of the assessment.
enum PageParts {
    static let style = """
        :root{color-scheme:light dark;--paper:#f6f7f9;--card:#fff;--ink:#1b1f24;--soft:#57606a;--line:#d8dee4;\
        --ready:#1a7f37;--warning:#9a6700;--blocked:#cf222e;--bar:#3b6fd4}
        @media(prefers-color-scheme:dark){:root{--paper:#0f1318;--card:#171c23;--ink:#e6eaef;--soft:#9aa5b1;\
        --line:#2d343d;--ready:#4ac26b;--warning:#d4a72c;--blocked:#ff7b72;--bar:#6f9dff}}
        *{box-sizing:border-box}
        body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
        header,main{max-width:1280px;margin:0 auto;padding:0 24px}
        header{padding-top:28px}
        h1{margin:0;font-size:26px;letter-spacing:-.01em}
        header p{margin:4px 0 20px;color:var(--soft)}
        .cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(120px,1fr));gap:12px}
        .card,figure,.filters,.scroll{background:var(--card);border:1px solid var(--line);border-radius:8px}
        .card{padding:12px 16px}
        .card b{display:block;font-size:24px;line-height:1.2;font-variant-numeric:tabular-nums;white-space:nowrap}
        .card span{color:var(--soft)}
        .ready b{color:var(--ready)}.warning b{color:var(--warning)}.blocked b{color:var(--blocked)}
        .share{display:flex;gap:2px;height:10px;margin:12px 0;border-radius:5px;overflow:hidden}
        .share i.ready{background:var(--ready)}.share i.warning{background:var(--warning)}.share i.blocked{background:var(--blocked)}
        .charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:12px}
        figure{margin:0;padding:14px 16px}
        figcaption{font-weight:600;margin-bottom:8px}
        svg{width:100%;height:auto;max-height:420px;display:block}
        svg text{font-size:12.5px;fill:var(--ink)}svg .value{fill:var(--soft)}svg rect{fill:var(--bar)}
        .none{color:var(--soft);margin:0}
        .filters{display:flex;flex-wrap:wrap;gap:10px 22px;align-items:center;padding:10px 16px;margin:16px 0 12px}
        label{white-space:nowrap}\
        fieldset{border:0;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:4px 14px}\
        legend{float:left;color:var(--soft);margin-right:14px}
        .search{flex:1 1 220px;display:flex;gap:8px;align-items:center}
        input[type=search]{flex:1;min-width:120px;font:inherit;padding:5px 9px;border:1px solid var(--line);border-radius:6px;\
        background:var(--paper);color:inherit}
        output{color:var(--soft);font-variant-numeric:tabular-nums}
        .scroll{overflow-x:auto}
        table{border-collapse:collapse;width:100%}
        th,td{text-align:left;vertical-align:top;padding:9px 12px;border-bottom:1px solid var(--line)}
        tr:last-child td{border-bottom:0}
        th{position:sticky;top:0;background:var(--card);color:var(--soft);font-weight:600;white-space:nowrap}
        th button{all:unset;cursor:pointer}th button:focus-visible,#more:focus-visible{outline:2px solid var(--bar);outline-offset:2px}
        th[aria-sort=ascending] button::after{content:" ↑"}th[aria-sort=descending] button::after{content:" ↓"}
        .number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
        td small{display:block;color:var(--soft);overflow-wrap:anywhere}
        td:nth-child(2){min-width:160px;overflow-wrap:anywhere}td:nth-child(6){min-width:170px}td:last-child{min-width:340px}
        .badge{display:inline-block;border:1px solid currentColor;border-radius:10px;padding:0 9px;font-size:13px;font-weight:600}
        .badge.ready{color:var(--ready)}.badge.warning{color:var(--warning)}.badge.blocked{color:var(--blocked)}
        ul{margin:0;padding:0;list-style:none}li+li{margin-top:7px}
        li.blocked{border-left:3px solid var(--blocked);padding-left:9px}li.warning{border-left:3px solid var(--warning);padding-left:9px}
        li.ready{border-left:3px solid var(--line);padding-left:9px;color:var(--soft)}
        #more{font:inherit;padding:7px 16px;border:1px solid var(--line);border-radius:6px;background:var(--card);color:inherit;cursor:pointer}
        @media(max-width:700px){header,main{padding:0 12px}.scroll{overflow:visible}table,tbody,tr,td{display:block}\
        thead{display:none}tr{padding:9px 0;border-bottom:1px solid var(--line)}tr:last-child{border-bottom:0}\
        td,td:nth-child(2),td:nth-child(6),td:last-child{min-width:0;padding:3px 12px;border:0}td:empty{display:none}\
        td.number{display:inline-block;text-align:left}td.number::before{content:attr(data-label) " ";color:var(--soft)}}
        @media print{.filters,#more{display:none}body{background:#fff}}
        """

    static let script = """
        'use strict';
        const data = JSON.parse(document.getElementById('data').textContent);
        const names = ['ready', 'warning', 'blocked'];
        const body = document.getElementById('rows'), more = document.getElementById('more');
        const search = document.getElementById('search'), gpu = document.getElementById('gpu');
        const sum = list => list.reduce((a, b) => a + b, 0);
        function size(bytes) {
          const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];
          let unit = 0;
          while (bytes >= 1024 && unit < 5) { bytes /= 1024; unit += 1; }
          return (bytes >= 100 || Number.isInteger(bytes) ? Math.round(bytes) : bytes.toFixed(1)) + ' ' + units[unit];
        }
        for (const row of data.rows) {
          const words = [row.n, ...row.w, ...row.i, ...row.h, ...row.g.flat(), ...row.r.map(at => data.reasons[at].slice(1).join(' '))];
          row.text = words.join(' ').toLowerCase();
          row.size = sum(row.d);
        }
        function element(name, kind, text) {
          const made = document.createElement(name);
          if (kind) made.className = kind;
          if (text !== undefined) made.textContent = text;
          return made;
        }
        function cell(row, kind, text, small) {
          const made = element('td', kind, text);
          if (small) made.append(element('small', '', small));
          row.append(made);
          return made;
        }
        function draw(vm) {
          const row = element('tr');
          cell(row).append(element('span', 'badge ' + names[vm.v], names[vm.v]));
          const networks = [...new Set(vm.w.filter(Boolean))].join(', ');
          cell(row, '', vm.n, [...vm.i.slice(0, 4), networks].filter(Boolean).join(' · '));
          cell(row, 'number', vm.c || '').dataset.label = 'CPUs';
          cell(row, 'number', vm.m ? size(vm.m) : '').dataset.label = 'Memory';
          cell(row, 'number', vm.d.length ? size(vm.size) : '', vm.d.length > 1 ? vm.d.length + ' disks' : '').dataset.label = 'Disks';
          const devices = cell(row);
          for (const [id, kind, name, fits] of vm.g) {
            const line = element('div', '', id + ': ' + (name ? name + ' (' + kind + ')' : kind));
            if (data.judged) line.append(element('small', '', fits ? 'fits ' + fits : 'fits no host'));
            devices.append(line);
          }
          const list = element('ul');
          for (const at of vm.r) {
            const [kind, message, remedy] = data.reasons[at];
            const item = element('li', kind, message);
            if (remedy) item.append(element('small', '', '→ ' + remedy));
            list.append(item);
          }
          if (vm.h.length) list.append(element('li', 'ready', 'goes to ' + vm.h.join(', ')));
          cell(row).append(list);
          return row;
        }
        const keys = { verdict: vm => -vm.v, name: vm => vm.n.toLowerCase(), cpus: vm => vm.c, memory: vm => vm.m, disks: vm => vm.size };
        let found = [], shown = 0, key = 'verdict', direction = 1;
        function extend() {
          const part = document.createDocumentFragment();
          for (const vm of found.slice(shown, shown + 100)) part.append(draw(vm));
          body.append(part);
          shown = Math.min(shown + 100, found.length);
          more.hidden = shown === found.length;
          more.textContent = 'Show more (' + (found.length - shown) + ' left)';
        }
        function update() {
          const wanted = new Set([...document.querySelectorAll('[name=status]:checked')].map(box => names.indexOf(box.value)));
          const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
          const value = keys[key];
          found = data.rows.filter(vm => wanted.has(vm.v) && (!gpu.checked || vm.u) && words.every(word => vm.text.includes(word)));
          found = found.map((vm, at) => [value(vm), at, vm]).sort((a, b) =>
            (a[0] < b[0] ? -direction : a[0] > b[0] ? direction : a[1] - b[1])).map(entry => entry[2]);
          for (const head of document.querySelectorAll('th button')) {
            head.parentNode.setAttribute('aria-sort', head.dataset.key !== key ? 'none' : direction > 0 ? 'ascending' : 'descending');
          }
          document.getElementById('count').textContent = found.length + ' of ' + data.rows.length;
          body.replaceChildren();
          shown = 0;
          extend();
        }
        for (const head of document.querySelectorAll('th button')) head.addEventListener('click', () => {
          direction = head.dataset.key === key ? -direction : 1;
          key = head.dataset.key;
          update();
        });
        let timer;
        search.addEventListener('input', () => { clearTimeout(timer); timer = setTimeout(update, 120); });
        for (const box of document.querySelectorAll('[type=checkbox]')) box.addEventListener('change', update);
        more.addEventListener('click', extend);
        update();
        """
}

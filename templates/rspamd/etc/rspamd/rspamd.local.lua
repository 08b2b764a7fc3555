local util = require "rspamd_util"
local logger = require "rspamd_logger"

local function list(name, kind, description)
  return rspamd_config:add_map({ url = "/etc/rspamd/posthorn-" .. name, type = kind, description = description })
end

-- An address or a domain as lists have it and as others write it, without what means nothing in a domain: the case, and the dot at
-- the end (RFC 1034 section 3.1). Names that are not ASCII are compared as the DNS has them (xn--): NO_ONE_AUTHOR_FIELD refuses
-- other authors, and Postfix other addresses. Local parts have no case here.
local function folded(name)
  return (name:lower():gsub("%.$", ""))
end

-- What a user's filter says or sends on comes from a mailbox host, which names the user in a header (templates/maildrop,
-- filter-mail). It is held to the same rules and limits as what that user submits. Before all else: limits ask for the user.
local mailbox_hosts = list("mailbox-hosts", "radix", "hosts that name the user whose filter a mail is of")
local MARK = "X-Posthorn-Filter"

rspamd_config:register_symbol({
  name = "OF_A_FILTER",
  type = "prefilter",
  priority = 10,
  callback = function(task)
    local client, mark = task:get_from_ip(), task:get_header(MARK)
    if task:get_user() or not mark or not (client and client:is_valid() and mailbox_hosts:get_key(client)) then
      return
    end
    local user, what = mark:match("^(%S+) (%S+)$")
    task:set_user(user)
    task:insert_result("OF_A_FILTER", 1.0, what)
    task:set_milter_reply({ remove_headers = { [MARK] = 0 } })
  end,
})

-- Whose recipients are counted (ratelimit.conf). What filters send has a limit of its own: else a stranger, whose mail a filter
-- sends on or answers, could use up what the user may write.
require("lua_selectors").register_extractor(rspamd_config, "posthorn_counted", {
  get_value = function(task)
    local user = task:get_user()
    if user then
      return (task:has_symbol("OF_A_FILTER") and "filters of " or "") .. user, "string"
    end
  end,
  description = "The user whose mail this is, or the user's filters",
})

local function is_sent_on(task)
  return task:has_symbol("OF_A_FILTER") and task:get_symbol("OF_A_FILTER")[1].options[1] == "redirects"
end

-- A mail has one From header, with its authors (RFC 5322 section 3.6). With none, or with two, readers and rules would not
-- see the same one. Each author costs questions to the DNS: nobody has that many.
local MOST = 8

-- A From header without what holds no address: quoted strings, comments, routes, and the names before <addresses>. What opens and
-- does not end is taken as it is.
local function bare(value)
  local text, kept, at = value:gsub("\\.", ""), {}, 1
  while at do
    local first, last = text:find('["(]', at)
    if first then
      last = select(2, text:find(text:sub(first, first) == "(" and "^%b()" or '^"[^"]*"', first))
    end
    table.insert(kept, text:sub(at, last and first - 1))
    at = last and last + 1
  end
  text = table.concat(kept):gsub("<%s*@[^<>:]*:", "<")
  return (("," .. text):gsub("([,>])[^,<>]*<", "%1<"))
end

rspamd_config:register_symbol({
  name = "NO_ONE_AUTHOR_FIELD",
  type = "prefilter",
  callback = function(task)
    local authors = task:get_from("mime") or {}
    local count = 0
    for line in tostring(task:get_raw_headers()):gmatch("[^\r\n]+") do
      -- With the blank that readers may let pass, and rspamd does not (RFC 5322 section 4.5.8).
      count = count + (line:lower():match("^from[ \t]*:") and 1 or 0)
    end
    local is_good = count == 1 and #authors > 0 and #authors <= MOST
    if is_good then
      -- Two addresses without a comma between them (a@x b@y, a@x@y, <a@x> <b@y>) have no reading that all share: rspamd, mail
      -- programs and other hosts each know another one of them, or both.
      local addresses = 0
      local text = bare(task:get_header_raw("From") or ""):gsub("<[^>]*", function(angled)
        return (angled:gsub(",", ""))
      end)
      for part in text:gmatch("[^,]+") do
        local _, found = part:gsub("@", "")
        is_good = is_good and found < 2
        addresses = addresses + found
      end
      is_good = is_good and addresses == #authors
    end
    for _, author in ipairs(authors) do
      -- What rspamd makes of a group (RFC 6854) is no domain: nobody could say whose mail it is. Nor are letters outside ASCII
      -- (RFC 6532 wants SMTPUTF8, which no host offers): the DNS takes some of them for dots, and the tree walk does not. Nor is
      -- anything between two dots, or before the first.
      local labels = "." .. folded(author.domain) .. "."
      is_good = is_good and labels:match("^[%w._-]+$") and not labels:find("..", 1, true)
    end
    if not is_good then
      local words = "a mail has one From header, with the addresses of its authors (RFC 5322 section 3.6)"
      task:set_pre_result("reject", words, "posthorn")
    end
  end,
})

-- Whoever has logged in writes as themselves: the From header has to be one of the user's own addresses, as the
-- envelope sender has to (which Postfix sees to, but for filters). RFC 6409 section 8.1. So have the headers that name who
-- sent or resent a mail in place of its author (RFC 5322 sections 3.6.2 and 3.6.6): mail programs show those too.
local owners = list("senders", "map", "users and the addresses that they may write as")

local function addresses_of(user)
  local name = folded(user):gsub("@.*$", "")
  return owners:get_key(name)
end

local function may(user, address)
  address = folded(address)
  local addresses = addresses_of(user) or ""
  local domain = address:match("@.*$") or ""
  local plain = address:gsub("%+[^@]*@", "@")
  for allowed in addresses:gmatch("[^,]+") do
    if allowed == address or allowed == plain or allowed == domain then
      return true
    end
  end
  return false
end

rspamd_config:register_symbol({
  name = "FROM_OF_ANOTHER",
  type = "prefilter",
  callback = function(task)
    local user = task:get_user()
    local kinds = user and { "smtp", "mime" } or {}
    if user and is_sent_on(task) then
      -- It has an author of its own: see DMARC_CHECK. Its user may have no address: then it goes as the postmaster (filter-mail).
      kinds = addresses_of(user) and { "smtp" } or {}
    end
    for _, kind in ipairs(kinds) do
      for _, author in ipairs(task:get_from(kind) or {}) do
        if author.addr ~= "" and not may(user, author.addr) then
          local words = string.format("%s may not write as %s", user, author.addr)
          task:set_pre_result("reject", words, "posthorn")
          return
        end
      end
    end
    if not user or is_sent_on(task) then
      return
    end
    for _, name in ipairs({ "Sender", "Resent-From", "Resent-Sender" }) do
      for _, header in ipairs(task:get_header_full(name) or {}) do
        for _, sender in ipairs(util.parse_mail_address(header.decoded, task:get_mempool()) or { { addr = "" } }) do
          if not may(user, sender.addr) then
            local words = string.format("%s may not write as %s (%s)", user, sender.addr, name)
            task:set_pre_result("reject", words, "posthorn")
            return
          end
        end
      end
    end
  end,
})

-- Who is kept out and who is let in by word of the stack (filter.deny and filter.allow). Clients that are kept out do not
-- come as far as this; who is let in passes greylisting and the score of spam, and no other check.
local domains = list("domains", "set", "domains of the stack")
local allowed_clients = list("allowed-clients", "radix", "clients whose mail passes")
local allowed_senders = list("allowed-senders", "set", "authors whose mail passes")
local denied_senders = list("denied-senders", "set", "senders from whom nothing is taken")

local function names(senders, address)
  address = folded(address)
  if senders:get_key(address) then
    return true
  end
  local domain = address:match("@(.*)$")
  while domain do
    if senders:get_key(domain) then
      return true
    end
    domain = domain:match("%.(.*)$")
  end
  return false
end

rspamd_config:register_symbol({
  name = "DENIED_SENDER",
  type = "prefilter",
  callback = function(task)
    if task:get_user() then
      return
    end
    for _, kind in ipairs({ "smtp", "mime" }) do
      for _, sender in ipairs(task:get_from(kind) or {}) do
        if names(denied_senders, sender.addr) then
          task:set_pre_result("reject", string.format("no mail of %s is taken here", sender.addr), "posthorn")
          return
        end
      end
    end
  end,
})

-- Before all filters: a score that reaches the limit ends them. Whoever writes as one of us gets nothing by it.
rspamd_config:register_symbol({
  name = "ALLOWED_CLIENT",
  type = "prefilter",
  score = -100,
  callback = function(task)
    local client = task:get_from_ip()
    if not (client and client:is_valid() and allowed_clients:get_key(client)) then
      return
    end
    for _, author in ipairs(task:get_from("mime") or {}) do
      if names(domains, author.addr) then
        return
      end
    end
    task:insert_result("ALLOWED_CLIENT", 1.0)
  end,
})

-- What the domains of a mail's authors ask of its receivers is done: DMARC, RFC 9989. rspamd's own module (dmarc.conf) knows the
-- organization of a name by a list of public suffixes; this one asks the DNS (section 4.10), and all authors are looked at.
local forwarders = list("allowed-forwarders", "set", "domains whose mail may have the authors of others")
local QUESTIONS = 8
local ORDER = { none = 0, quarantine = 1, reject = 2 }
local SYMBOLS = { none = "DMARC_POLICY_SOFTFAIL", quarantine = "DMARC_POLICY_QUARANTINE", reject = "DMARC_POLICY_REJECT" }

-- What the DNS says: a list, which is empty where there is nothing; nil where it did not answer. It is for what `with_answers`
-- runs, which does the asking.
local function ask(kind, name)
  local answers, failure = coroutine.yield(kind, name)
  local nothing = failure == "no records with this name" or failure == "requested record is not found"
  return answers or (nothing and {}) or nil
end

-- Runs a function that asks the DNS as if answers came at once. rspamd's own way to do so (rspamd_dns.request, with the flag
-- "coro") takes one mail's questions for another's where many mails come side by side, and the scanner dies of it (rspamd issue
-- 4902). Its resolver with callbacks, which rspamd's own rules use, does not.
local function with_answers(task, work)
  local steps = coroutine.create(work)
  local function go_on(...)
    local is_well, kind, name = coroutine.resume(steps, ...)
    if not is_well then
      -- Without a verdict nothing passes.
      logger.errx(task, "%s", kind)
      task:set_pre_result("soft reject", "this mail cannot be judged now", "posthorn")
    elseif coroutine.status(steps) ~= "dead" then
      local is_asked = task:get_resolver():resolve(kind, {
        task = task,
        name = name,
        forced = true,
        callback = function(_, _, answers, failure)
          go_on(answers, failure)
        end,
      })
      if not is_asked then
        go_on(nil, "the question could not be asked")
      end
    end
  end
  go_on()
end

-- The tags of the DMARC record of a name; false where there is none, or more than one; nil where the DNS did not answer.
local function record(name, seen)
  if seen[name] == nil then
    local answers = ask("txt", "_dmarc." .. name)
    if not answers then
      return nil
    end
    local found = {}
    for _, text in ipairs(answers) do
      local tags = text:match("^v%s*=%s*DMARC1%s*;?(.*)$")
      -- "v=DMARC12" is another thing.
      if tags and not text:match("^v%s*=%s*DMARC1[%w]") then
        table.insert(found, tags)
      end
    end
    seen[name] = false
    if #found == 1 then
      seen[name] = {}
      for tag, value in found[1]:gmatch("(%a+)%s*=%s*([^;]*)") do
        seen[name][tag:lower()] = value:gsub("%s+$", ""):lower()
      end
    end
  end
  return seen[name]
end

-- The organization that a name belongs to, and the record that speaks for it: the tree walk of sections 4.10.1 and 4.10.2.
-- nil where the DNS did not answer.
local function organization(name, seen)
  local labels = {}
  for label in name:gmatch("[^.]+") do
    table.insert(labels, label)
  end
  local names = { name }
  for first = math.max(2, #labels - QUESTIONS + 2), #labels do
    table.insert(names, table.concat(labels, ".", first))
  end
  local top, own, last
  for position, at in ipairs(names) do
    local tags = record(at, seen)
    if tags == nil then
      return nil
    elseif tags then
      if tags.psd == "y" and position > 1 then
        local _, dots = at:gsub("%.", "")
        top = table.concat(labels, ".", #labels - dots - 1)
        return top, own or seen[top] or tags
      end
      own = position == 1 and tags or own
      top, last = at, tags
      if tags.psd == "n" then
        break
      end
    end
  end
  return top or name, own or last
end

-- The domains that prove to have sent a mail: of its envelope by SPF, of its signatures by DKIM.
local function proved(task)
  local found = {}
  if task:has_symbol("R_SPF_ALLOW") then
    local sender = (task:get_from("smtp") or {})[1]
    -- Without a sender SPF is about the greeting (RFC 7208 section 2.4).
    local domain = sender and sender.domain ~= "" and sender.domain or task:get_helo() or ""
    table.insert(found, { name = folded(domain), mode = "aspf" })
  end
  for _, trace in ipairs(task:get_symbol("DKIM_TRACE") or {}) do
    for _, signer in ipairs(trace.options or {}) do
      local domain = signer:match("^(.*):%+$")
      if domain then
        table.insert(found, { name = folded(domain), mode = "adkim" })
      end
    end
  end
  return found
end

-- Whether one of those domains is that of an author, or of the same organization (section 4.4); nil where the DNS did not
-- answer. Without tags: whether the domain has a DMARC policy or not.
local function is_proved(domain, by, tags, seen)
  local home, unknown
  for _, proof in ipairs(by) do
    if proof.name == domain then
      return true
    end
  end
  for _, proof in ipairs(by) do
    if tags[proof.mode] ~= "s" then
      home = home or organization(domain, seen)
      local its = organization(proof.name, seen)
      if home and home == its then
        return true
      end
      unknown = unknown or not (home and its)
    end
  end
  if unknown then
    return nil
  end
  return false
end

-- What a domain asks to be done with a mail that is not its own (section 4.7); nil where it asks nothing.
local function asked_for(domain, own, tags)
  local words = tags.p
  if not own then
    words = tags.sp or tags.p
    if tags.np then
      local exists = false
      for _, kind in ipairs({ "a", "aaaa", "mx" }) do
        local answers = ask(kind, domain)
        exists = exists or not answers or #answers > 0
      end
      words = exists and words or tags.np
    end
  end
  -- A policy that is only tried is not applied.
  return (tags.t ~= "y" and ORDER[words or ""]) and words or "none"
end

local function later(task, domain)
  task:insert_result("DMARC_DNSFAIL", 1.0, domain .. " : the DNS did not answer")
  task:set_pre_result("soft reject", "the DNS does not say now who may write as " .. domain, "posthorn")
end

-- A mail that a filter sends on leaves with an envelope sender of ours, with which an author of ours would pass DMARC
-- everywhere: such an author has to be the user, or to have signed the mail as it leaves.
local function check_sent_on(task, authors, seen)
  local by = {}
  for _, proof in ipairs(proved(task)) do
    if proof.mode == "adkim" then
      table.insert(by, proof)
    end
  end
  for _, author in ipairs(authors) do
    if names(domains, author.addr) and not may(task:get_user(), author.addr) then
      if is_proved(folded(author.domain), by, {}, seen) then
        -- As it was when its author sent it.
      elseif task:has_symbol("R_DKIM_TEMPFAIL") then
        return later(task, author.domain)
      else
        local words = string.format("this mail is not as %s sent it: it is not sent on", author.addr)
        return task:set_pre_result("reject", words, "posthorn")
      end
    end
  end
end

local function check_authors(task)
  local authors, seen, done = task:get_from("mime") or {}, {}, {}
  if task:get_user() then
    return is_sent_on(task) and check_sent_on(task, authors, seen)
  end
  local by, worst, doubtful, is_allowed = proved(task), nil, nil, #authors > 0
  for _, author in ipairs(authors) do
    local domain = folded(author.domain)
    local verdict = done[domain]
    if not verdict then
      local home, tags = organization(domain, seen)
      local proof = is_proved(domain, by, tags or {}, seen)
      verdict = { domain = domain, proved = proof, says = "none", policy = tags and (tags.p or "none") }
      if not proof then
        if home and tags then
          verdict.says = asked_for(domain, tags == seen[domain], tags)
        end
        local unsure = proof == nil or task:has_symbol("R_SPF_DNSFAIL") or task:has_symbol("R_DKIM_TEMPFAIL")
        if not home or (unsure and verdict.says ~= "none") then
          doubtful = domain
        end
      end
      done[domain] = verdict
      if not worst or (not verdict.proved and (worst.proved or ORDER[verdict.says] > ORDER[worst.says])) then
        worst = verdict
      end
    end
    is_allowed = is_allowed and verdict.proved and names(allowed_senders, author.addr)
    if doubtful then
      return later(task, doubtful)
    end
    -- A mail that an alias sends on gets an envelope sender of ours, with which a forged author of ours would pass DMARC
    -- everywhere. Who is let in by word gets nothing by it here.
    if verdict.says ~= "none" and names(domains, author.addr) then
      local words = string.format("this mail is not from %s (RFC 9989)", author.addr)
      task:insert_result(SYMBOLS[verdict.says], 1.0, domain .. " : not proved", verdict.says)
      task:set_pre_result("reject", words, "posthorn")
      return
    end
  end
  if is_allowed then
    task:insert_result("ALLOWED_SENDER", 1.0)
  end
  if not worst or not worst.policy then
    task:insert_result("DMARC_NA", 1.0, worst and worst.domain or "no author")
    return
  elseif worst.proved then
    task:insert_result("DMARC_POLICY_ALLOW", 1.0, worst.domain, worst.policy)
    return
  end
  local is_let_in = task:has_symbol("ALLOWED_CLIENT")
  for _, proof in ipairs(by) do
    is_let_in = is_let_in or names(forwarders, "@" .. proof.name)
  end
  local says = is_let_in and "none" or worst.says
  task:insert_result(SYMBOLS[says], 1.0, worst.domain .. " : neither SPF nor DKIM proves it", says)
  if says == "reject" then
    local words = string.format("%s has mail refused that is not proved to be its own (RFC 9989)", worst.domain)
    task:set_pre_result("reject", words, "posthorn")
  elseif says == "quarantine" then
    task:set_pre_result("add header", "as its domain asks (RFC 9989)", "posthorn", nil, nil, "least")
  end
end

local check = rspamd_config:register_symbol({
  name = "DMARC_CHECK",
  -- Also when others have reached the limit.
  flags = "fine",
  score = 0.0,
  callback = function(task)
    with_answers(task, function()
      check_authors(task)
    end)
  end,
})
-- The names by which other modules know what was found.
for _, name in ipairs({ "POLICY_ALLOW", "POLICY_SOFTFAIL", "POLICY_QUARANTINE", "POLICY_REJECT", "NA" }) do
  rspamd_config:register_symbol({ name = "DMARC_" .. name, type = "virtual", parent = check })
end
for _, name in ipairs({ "CALLBACK", "DNSFAIL" }) do
  rspamd_config:register_symbol({ name = "DMARC_" .. name, type = "virtual", parent = check, score = 0.0 })
end
rspamd_config:register_symbol({ name = "ALLOWED_SENDER", type = "virtual", parent = check, score = -100 })
rspamd_config:register_dependency("DMARC_CHECK", "R_SPF_ALLOW")
rspamd_config:register_dependency("DMARC_CHECK", "R_DKIM_ALLOW")

-- What leads elsewhere leaves under our name. Spam is not sent on, nor is a mail whose sender is forged by the word of that
-- sender's own domain: were it refused there, its bounce would go to somebody who never wrote it. It is refused here, while
-- the client is there to be told.
local elsewhere = list("elsewhere", "map", "addresses whose mail leaves the stack")

local function leads_elsewhere(address)
  address = folded(address)
  -- An MX knows its own addresses in brackets by the local part alone (virtual(5)).
  local plain = address:gsub("%+[^@]*@", "@"):gsub("@%[.*%]$", "")
  local leads = elsewhere:get_key(address) or elsewhere:get_key(plain) or elsewhere:get_key(address:match("@.*$") or "")
  return leads == "yes"
end

rspamd_config:register_symbol({
  name = "NOT_SENT_ON",
  type = "postfilter",
  callback = function(task)
    for _, recipient in ipairs(not task:get_user() and task:get_recipients("smtp") or {}) do
      if leads_elsewhere(recipient.addr) then
        local words
        local action = task:get_metric_action()
        if action == "add header" or action == "rewrite subject" then
          words = "this mail looks like spam"
        elseif task:has_symbol("R_SPF_FAIL") or task:has_symbol("R_SPF_SOFTFAIL") then
          local sender = (task:get_from("smtp") or {})[1]
          words = sender and sender.addr .. " is not proved to have sent this mail"
          for _, proof in ipairs(proved(task)) do
            if proof.name == folded(sender.domain) or task:has_symbol("DMARC_POLICY_ALLOW") then
              words = nil
            end
          end
        end
        if words then
          words = string.format("%s, and %s leads elsewhere: it is not sent on", words, recipient.addr)
          task:set_pre_result("reject", words, "posthorn")
          return
        end
      end
    end
  end,
})

local util = require "rspamd_util"

local function list(name, kind, description)
  return rspamd_config:add_map({ url = "/etc/rspamd/posthorn-" .. name, type = kind, description = description })
end

-- Whoever has logged in writes as themselves: the From header has to be one of the user's own addresses, as the
-- envelope sender has to (which Postfix sees to). RFC 6409 section 8.1. So have the headers that name who sent or resent a
-- mail in place of its author (RFC 5322 sections 3.6.2 and 3.6.6): mail programs show those too.
local owners = list("senders", "map", "users and the addresses that they may write as")

local function may(addresses, address)
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
    if not user then
      return
    end
    local addresses = owners:get_key(user:lower():gsub("@.*$", "")) or ""
    local from = task:get_from("mime") or {}
    for _, author in ipairs(from) do
      if not may(addresses, author.addr:lower()) then
        local words = string.format("%s may not write as %s", user, author.addr)
        task:set_pre_result("reject", words, "posthorn")
        return
      end
    end
    for _, name in ipairs({ "Sender", "Resent-From", "Resent-Sender" }) do
      for _, header in ipairs(task:get_header_full(name) or {}) do
        for _, sender in ipairs(util.parse_mail_address(header.decoded, task:get_mempool()) or { { addr = "" } }) do
          if not may(addresses, sender.addr:lower()) then
            local words = string.format("%s may not write as %s (%s)", user, sender.addr, name)
            task:set_pre_result("reject", words, "posthorn")
            return
          end
        end
      end
    end
    if #from == 0 then
      task:set_pre_result("reject", "a From header is needed (RFC 5322 section 3.6)", "posthorn")
    end
  end,
})

-- Whoever has not logged in, and whom neither SPF nor DKIM proves to be one of us, does not write as one of us: what
-- our own domains ask of others by DMARC (RFC 7489 section 6.3) is done here too. A mail that an alias or a filter sends
-- on gets an envelope sender of ours, with which a forged author of ours would pass DMARC everywhere.
local domains = list("domains", "set", "domains of the stack")

rspamd_config:register_symbol({
  name = "FORGED_AS_OURS",
  type = "postfilter",
  callback = function(task)
    if task:get_user() then
      return
    end
    if not (task:has_symbol("DMARC_POLICY_REJECT") or task:has_symbol("DMARC_POLICY_QUARANTINE")) then
      return
    end
    for _, author in ipairs(task:get_from("mime") or {}) do
      if domains:get_key(author.domain:lower()) then
        local words = string.format("this mail is not from %s (RFC 7489)", author.addr)
        task:set_pre_result("reject", words, "posthorn")
        return
      end
    end
  end,
})

-- Who is kept out and who is let in by word of the stack (filter.deny and filter.allow). Clients that are kept out do not
-- come as far as this; who is let in passes greylisting and the score of spam, and no other check.
local allowed_clients = list("allowed-clients", "radix", "clients whose mail passes")
local allowed_senders = list("allowed-senders", "set", "authors whose mail passes")
local denied_senders = list("denied-senders", "set", "senders from whom nothing is taken")

local function names(senders, address)
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
        if names(denied_senders, sender.addr:lower()) then
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
      if names(domains, author.addr:lower()) then
        return
      end
    end
    task:insert_result("ALLOWED_CLIENT", 1.0)
  end,
})

-- The domains that prove to have sent a mail: of its envelope by SPF, of its signatures by DKIM.
local function proved(task)
  local found = {}
  local sender = (task:get_from("smtp") or {})[1]
  if sender and sender.domain ~= "" and task:has_symbol("R_SPF_ALLOW") then
    table.insert(found, sender.domain)
  end
  for _, trace in ipairs(task:get_symbol("DKIM_TRACE") or {}) do
    for _, signer in ipairs(trace.options or {}) do
      table.insert(found, signer:match("^(.*):%+$"))
    end
  end
  return found
end

-- Aligned as DMARC means it: of one organization (RFC 7489 section 3.1), whether the domain has a DMARC policy or not.
local function is_proved(author, by)
  for _, domain in ipairs(by) do
    if util.get_tld(domain:lower()) == util.get_tld(author.domain:lower()) then
      return true
    end
  end
  return false
end

rspamd_config:register_symbol({
  name = "ALLOWED_SENDER",
  -- Also when others have reached the limit.
  flags = "fine",
  score = -100,
  callback = function(task)
    local authors, by = task:get_from("mime") or {}, proved(task)
    for _, author in ipairs(authors) do
      if not (names(allowed_senders, author.addr:lower()) and is_proved(author, by)) then
        return
      end
    end
    if #authors > 0 and not task:get_user() then
      task:insert_result("ALLOWED_SENDER", 1.0)
    end
  end,
})
rspamd_config:register_dependency("ALLOWED_SENDER", "R_SPF_ALLOW")
rspamd_config:register_dependency("ALLOWED_SENDER", "R_DKIM_ALLOW")

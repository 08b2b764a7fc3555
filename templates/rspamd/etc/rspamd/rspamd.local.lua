-- Whoever has logged in writes as themselves: the From header has to be one of the user's own addresses, as the
-- envelope sender has to (which Postfix sees to). RFC 6409 section 8.1.
local owners = rspamd_config:add_map({
  url = "/etc/rspamd/posthorn-senders",
  type = "map",
  description = "users and the addresses that they may write as",
})

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
    if #from == 0 then
      task:set_pre_result("reject", "a From header is needed (RFC 5322 section 3.6)", "posthorn")
    end
  end,
})

-- Whoever has not logged in, and whom neither SPF nor DKIM proves to be one of us, does not write as one of us: what
-- our own domains ask of others by DMARC (RFC 7489 section 6.3) is done here too. A mail that an alias or a filter sends
-- on gets an envelope sender of ours, with which a forged author of ours would pass DMARC everywhere.
local domains = rspamd_config:add_map({
  url = "/etc/rspamd/posthorn-domains",
  type = "set",
  description = "domains of the stack",
})

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

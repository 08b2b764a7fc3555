<?php

/**
 * What a user puts into the web mail (contacts, groups, identities, answers, settings) as it lies in their mailbox.
 *
 * The state is a list of records, each with the time of its last change; one that is gone has no data. It is one message
 * in a folder of its own, so that it is replicated, kept and restored like mail. Two states are brought together record
 * by record, the later one counts. So it does no harm that two hosts write at the same time: whoever comes next finds
 * two messages, and makes one of them.
 *
 * The database of this host is a copy. What was last brought together is remembered in it (the base): what differs from
 * the base was changed here since.
 */
class posthorn_state
{
    const FOLDER = 'Webmail';
    const SUBJECT = 'Contacts and settings of the web mail: please leave this here';
    const LARGEST = 50000000;
    /** So many mails are read, the newest, that may be a state of an older Posthorn: those of strangers cost little. */
    const OLDER = 4;
    /** How long it is remembered that a record is gone, in milliseconds: a host that was away longer would bring it back. */
    const GONE = 400 * 86400 * 1000;
    /** Table to the name of its key, whether its rows are only marked when they are deleted, and the columns that count. */
    const TABLES = [
        'contacts' => ['contact_id', true, ['name', 'email', 'firstname', 'surname', 'vcard', 'words']],
        'contactgroups' => ['contactgroup_id', true, ['name']],
        'identities' => [
            'identity_id',
            true,
            ['standard', 'name', 'organization', 'email', 'reply-to', 'bcc', 'signature', 'html_signature'],
        ],
        'responses' => ['response_id', true, ['name', 'data', 'is_html']],
        'collected_addresses' => ['address_id', false, ['name', 'email', 'type']],
    ];

    private $rc;
    private $db;
    private $user;
    /** Table to id to the key of the record. */
    private $ids = [];

    public function __construct($rc)
    {
        $this->rc = $rc;
        $this->db = $rc->get_dbh();
        $this->user = $rc->user->ID;
    }

    /**
     * Brings database and mailbox together. Unless asked to, it looks into the mailbox only when something was changed here.
     *
     * Throws RuntimeException where the mailbox cannot be read or written: then nothing is changed, and the next time will do it.
     */
    public function bring($ask)
    {
        $lock = fopen($this->rc->config->get('temp_dir') . "/state-{$this->user}.lock", 'c');
        flock($lock, LOCK_EX);
        $base = $this->base();
        $rows = $this->rows();
        $mine = $this->since($base, $rows);
        if (!$ask && $base !== null && self::text($mine) == self::text($base)) {
            return;
        }
        $found = $this->in_mailbox();
        $state = $mine;
        foreach ($found as $other) {
            $state = self::later($state, $other);
        }
        $horizon = self::now() - self::GONE;
        $state = array_filter($state, fn ($record) => $record['data'] !== null || $record['time'] > $horizon);
        if (count($found) != 1 || self::text(reset($found)) != self::text($state)) {
            $this->into_mailbox($state, array_keys($found));
        }
        $this->db->startTransaction();
        $this->apply($state, $rows);
        $this->remember($state);
        if ($this->db->is_error()) {
            $this->db->rollbackTransaction();
            throw new RuntimeException($this->db->is_error());
        }
        $this->db->endTransaction();
    }

    // Records

    private static function now()
    {
        return (int) (microtime(true) * 1000);
    }

    /** The same text for the same records. */
    private static function text($records)
    {
        ksort($records);
        return json_encode($records, JSON_UNESCAPED_SLASHES | JSON_UNESCAPED_UNICODE | JSON_INVALID_UTF8_SUBSTITUTE);
    }

    private static function same($one, $other)
    {
        return self::text([$one]) == self::text([$other]);
    }

    /** Of each record the one that was changed later. */
    private static function later($one, $other)
    {
        foreach ($other as $key => $record) {
            $known = $one[$key] ?? null;
            // Two of one time: any order will do that is the same everywhere.
            if ($known === null || [$record['time'], self::text($record)] > [$known['time'], self::text($known)]) {
                $one[$key] = $record;
            }
        }
        return $one;
    }

    /**
     * The base, with what was changed here since. Where there is none, what is here counts less than anything else.
     *
     * A change is later than what it changes, even where that was written by a host whose clock is ahead.
     */
    private function since($base, $rows)
    {
        $now = $base === null ? 0 : self::now();
        $records = $base ?? [];
        $after = fn ($record) => max($now, ($record['time'] ?? -1) + 1);
        foreach ($rows as $key => $data) {
            if (!isset($records[$key]) || !self::same($records[$key]['data'], $data)) {
                $records[$key] = ['time' => $after($records[$key] ?? null), 'data' => $data];
            }
        }
        foreach ($records as $key => $record) {
            if ($record['data'] !== null && !isset($rows[$key])) {
                $records[$key] = ['time' => $after($record), 'data' => null];
            }
        }
        return $records;
    }

    // The database

    /** Key to data of all that the database has of this user. */
    private function rows()
    {
        $rows = [];
        foreach (self::TABLES as $table => [$id, $marked, $columns]) {
            $known = $this->ids[$table] ?? [];
            $this->ids[$table] = [];
            $where = $marked ? ' AND `del` <> 1' : '';
            $result = $this->db->query("SELECT * FROM {$this->name($table)} WHERE `user_id` = ?{$where} ORDER BY `$id`", $this->user);
            while ($row = $this->db->fetch_assoc($result)) {
                $data = array_map('strval', array_intersect_key($row, array_flip($columns)));
                $key = $known[$row[$id]] ?? $this->key($table, $data, $known);
                $this->ids[$table][$row[$id]] = $key;
                $rows[$key] = $data;
            }
        }
        foreach ($this->ids['contactgroups'] as $group => $key) {
            $rows[$key]['members'] = $this->members($group);
        }
        $result = $this->db->query("SELECT `language`, `preferences` FROM {$this->name('users')} WHERE `user_id` = ?", $this->user);
        $settings = $this->db->fetch_assoc($result);
        $preferences = (array) @unserialize((string) $settings['preferences'], ['allowed_classes' => false]);
        // When the last mail was sent is this host's business.
        unset($preferences['last_message_time']);
        ksort($preferences);
        $rows['settings'] = ['language' => (string) $settings['language'], 'preferences' => $preferences];
        // As it will be once it was written down and read again.
        return json_decode(self::text($rows), true);
    }

    /** A key for a new row. What is made alike at every host gets the same there. */
    private function key($table, $data, $known)
    {
        $taken = array_merge($known, $this->ids[$table]);
        if ($table == 'collected_addresses') {
            return "$table:{$data['type']}:{$data['email']}";
        }
        if ($table == 'identities' && !in_array("$table:{$data['email']}", $taken)) {
            return "$table:{$data['email']}";
        }
        return "$table:" . bin2hex(random_bytes(12));
    }

    private function members($group)
    {
        $keys = [];
        $result = $this->db->query("SELECT `contact_id` FROM {$this->name('contactgroupmembers')} WHERE `contactgroup_id` = ?", $group);
        while ($row = $this->db->fetch_assoc($result)) {
            if (isset($this->ids['contacts'][$row['contact_id']])) {
                $keys[] = $this->ids['contacts'][$row['contact_id']];
            }
        }
        sort($keys);
        return $keys;
    }

    /** Brings the database to a state. */
    private function apply($state, $rows)
    {
        foreach (self::TABLES as $table => [$id, $marked, $columns]) {
            foreach ($state as $key => $record) {
                if (strtok($key, ':') == $table && !self::same($record['data'], $rows[$key] ?? null)) {
                    $row = array_search($key, $this->ids[$table], true);
                    $this->put($table, $key, $row === false ? null : $row, $record['data']);
                }
            }
        }
        $settings = $state['settings']['data'] ?? null;
        if ($settings !== null && !self::same($settings, $rows['settings'])) {
            $this->db->query(
                "UPDATE {$this->name('users')} SET `language` = ?, `preferences` = ? WHERE `user_id` = ?",
                $settings['language'], serialize((array) $settings['preferences']), $this->user
            );
            $_SESSION['language'] = $settings['language'] ?: ($_SESSION['language'] ?? null);
        }
    }

    /** Writes one row; no data means that it is to go. */
    private function put($table, $key, $row, $data)
    {
        [$id, $marked, $columns] = self::TABLES[$table];
        $now = $this->db->now();
        if ($data === null) {
            if ($row !== null) {
                $gone = $marked ? "UPDATE {$this->name($table)} SET `del` = 1, `changed` = $now" : "DELETE FROM {$this->name($table)}";
                $this->db->query("$gone WHERE `$id` = ? AND `user_id` = ?", $row, $this->user);
                unset($this->ids[$table][$row]);
            }
            return;
        }
        $values = array_map(fn ($column) => $data[$column] ?? '', $columns);
        $names = array_map([$this->db, 'quote_identifier'], $columns);
        if ($row === null) {
            $marks = implode(', ', array_fill(0, count($columns), '?'));
            $this->db->query(
                "INSERT INTO {$this->name($table)} (`user_id`, `changed`, " . implode(', ', $names) . ") VALUES (?, $now, $marks)",
                array_merge([$this->user], $values)
            );
            $row = $this->db->insert_id($table);
            $this->ids[$table][$row] = $key;
        } else {
            $set = implode(', ', array_map(fn ($name) => "$name = ?", $names));
            $this->db->query(
                "UPDATE {$this->name($table)} SET `changed` = $now, $set WHERE `$id` = ? AND `user_id` = ?",
                array_merge($values, [$row, $this->user])
            );
        }
        if ($table == 'contactgroups') {
            $this->db->query("DELETE FROM {$this->name('contactgroupmembers')} WHERE `contactgroup_id` = ?", $row);
            foreach ($data['members'] ?? [] as $member) {
                $contact = array_search($member, $this->ids['contacts'], true);
                if ($contact !== false) {
                    $this->db->query(
                        "INSERT INTO {$this->name('contactgroupmembers')} (`contactgroup_id`, `contact_id`, `created`) VALUES (?, ?, $now)",
                        $row, $contact
                    );
                }
            }
        }
    }

    private function name($table)
    {
        return $this->db->table_name($table, true);
    }

    /** The records that were last brought together here; null when that never was. */
    private function base()
    {
        $result = $this->db->query(
            "SELECT `data` FROM {$this->name('filestore')} WHERE `user_id` = ? AND `context` = 'posthorn' AND `filename` = 'base'", $this->user
        );
        $row = $this->db->fetch_assoc($result);
        $base = $row ? json_decode($row['data'], true) : null;
        $this->ids = $base['ids'] ?? [];
        return $base['records'] ?? null;
    }

    private function remember($state)
    {
        $this->db->query("DELETE FROM {$this->name('filestore')} WHERE `user_id` = ? AND `context` = 'posthorn'", $this->user);
        $this->db->query(
            "INSERT INTO {$this->name('filestore')} (`user_id`, `context`, `filename`, `mtime`, `data`) VALUES (?, 'posthorn', 'base', ?, ?)",
            $this->user, time(), self::text(['ids' => $this->ids, 'records' => $state])
        );
    }

    // The mailbox

    /** UID to records of every state that lies in the mailbox, and that a host of this stack has written. */
    private function in_mailbox()
    {
        $storage = $this->rc->get_storage();
        if (!$storage->check_connection()) {
            throw new RuntimeException('the mailbox does not answer');
        }
        if (!$storage->folder_exists(self::FOLDER)) {
            return [];
        }
        $before = $storage->get_folder();
        $storage->set_folder(self::FOLDER);
        $found = [];
        // Mails of others, which may be many and large, are not read.
        $known = 'HEADER X-Posthorn-Seal ' . $this->seal('');
        // Without the seal by which they are found: until all hosts of the web mail are of this version, both are written.
        $older = 'SUBJECT "' . self::SUBJECT . '" HEADER X-Posthorn-Seal "" NOT ' . $known;
        $search = fn ($which) => $storage->search_once(self::FOLDER, 'UNDELETED SMALLER ' . self::LARGEST . " $which")->get();
        foreach (array_merge($search($known), array_slice($search($older), -self::OLDER)) as $uid) {
            $raw = $storage->get_raw_body($uid);
            if (!$raw) {
                throw new RuntimeException("message $uid cannot be read");
            }
            $records = $this->opened($raw);
            if ($records !== null) {
                $found[$uid] = $records;
            }
        }
        $storage->set_folder($before);
        return $found;
    }

    /** Puts a state into the mailbox; then those go that it was made of. */
    private function into_mailbox($state, $old)
    {
        $storage = $this->rc->get_storage();
        if (!$storage->folder_exists(self::FOLDER) && !$storage->create_folder(self::FOLDER)) {
            throw new RuntimeException('the folder cannot be made: ' . $storage->get_error_str());
        }
        $message = $this->sealed($state);
        if (!$storage->save_message(self::FOLDER, $message, '', false, ['SEEN'])) {
            throw new RuntimeException('the mailbox does not take it: ' . $storage->get_error_str());
        }
        if ($old) {
            $storage->delete_message($old, self::FOLDER);
        }
    }

    /**
     * Shows that a state was written by a host of this stack, for this user: anybody may send a mail that looks like one.
     *
     * That of no text is the same for all states of a user, who alone can read it: by it they are found.
     */
    private function seal($text)
    {
        $key = hash_hmac('sha256', 'state of a user', $this->rc->config->get('des_key'));
        return hash_hmac('sha256', $this->rc->get_user_name() . "\n" . $text, $key);
    }

    private function sealed($state)
    {
        $text = self::text($state);
        $lines = [
            'From: Webmail <>',
            'Date: ' . date('r'),
            'Subject: ' . self::SUBJECT,
            'MIME-Version: 1.0',
            'Content-Type: application/json; charset=utf-8',
            'Content-Transfer-Encoding: base64',
            'X-Posthorn-Seal: ' . $this->seal('') . ' ' . $this->seal($text),
            '',
            chunk_split(base64_encode($text)),
        ];
        return implode("\r\n", $lines);
    }

    private function opened($raw)
    {
        [$head, $body] = explode("\r\n\r\n", str_replace(["\r\n", "\n"], ["\n", "\r\n"], $raw), 2) + ['', ''];
        $text = base64_decode($body);
        if (!preg_match('/^X-Posthorn-Seal: (?:[0-9a-f]{64}\s+)?([0-9a-f]{64})\r?$/mi', $head, $match)
            || !hash_equals($this->seal($text), $match[1])) {
            return null;
        }
        return json_decode($text, true);
    }
}

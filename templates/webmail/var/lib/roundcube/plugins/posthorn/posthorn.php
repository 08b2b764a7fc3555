<?php

require_once __DIR__ . '/state.php';

/**
 * What ties Roundcube to the stack: accounts and their addresses, where a user sits, and the state that lies in the mailbox.
 */
class posthorn extends rcube_plugin
{
    const ADDRESSES = '/etc/posthorn/webmail/addresses.json';
    const LOGINS = '/etc/posthorn/webmail/logins.json';
    const UNSAVED = 'posthorn_unsaved';

    private $rc;

    public function init()
    {
        $this->rc = rcmail::get_instance();
        $this->add_hook('authenticate', [$this, 'authenticate']);
        $this->add_hook('storage_connect', [$this, 'storage_connect']);
        $this->add_hook('user_create', [$this, 'user_create']);
        $this->add_hook('login_after', [$this, 'login_after']);
        $this->add_hook('ready', [$this, 'ready']);
        if (($_SERVER['REQUEST_METHOD'] ?? '') == 'POST') {
            // Whatever the request was for: what it changed is looked for when it is done.
            $this->rc->add_shutdown_function([$this, 'save']);
        }
    }

    /** One user, whether they write the account's name or an address of theirs, as for other mail programs. */
    public function authenticate($args)
    {
        $typed = mb_strtolower($args['user']);
        // What is nobody's goes on as it is, and is refused by the mailbox host.
        $args['user'] = $this->read(self::LOGINS)[$typed] ?? $typed;
        return $args;
    }

    /** The mailbox host hears who the client is: what it counts and logs is about them, not about this host. */
    public function storage_connect($args)
    {
        $args['preauth_ident'] = ['x-originating-ip' => rcube_utils::remote_addr()];
        return $args;
    }

    /** A new user writes as every address that the stack gives the account. */
    public function user_create($args)
    {
        foreach ($this->addresses($args['user']) as $address) {
            $args['email_list'][] = ['email' => $address];
        }
        return $args;
    }

    public function login_after($args)
    {
        // Whoever logs in here is logged in nowhere else: NGINX is not to send them back to an old session.
        $own = [$this->rc->config->get('session_name'), $this->rc->config->get('session_auth_name')];
        foreach (array_diff(array_keys($_COOKIE), $own) as $name) {
            if (str_starts_with($name, 'webmail_')) {
                rcube_utils::setcookie($name, '-del-', time() - 60);
            }
        }
        $this->bring(true);
        $this->identities();
        return $args;
    }

    /** Before a page that shows what users put in: it may have been changed through another host. */
    public function ready($args)
    {
        $shows = in_array($args['task'], ['addressbook', 'settings']) && !$args['action'];
        if ($_SERVER['REQUEST_METHOD'] == 'GET' && ($shows || [$args['task'], $args['action']] == ['mail', 'compose'])) {
            $this->bring(true);
        }
        if (!empty($_SESSION[self::UNSAVED])) {
            $this->rc->output->show_message(
                'Contacts and settings cannot be put into your mailbox now. What you change may be lost.', 'warning'
            );
        }
        return $args;
    }

    public function save()
    {
        if ($this->rc->user && $this->rc->user->ID && $this->rc->task != 'login') {
            $this->bring(false);
        }
    }

    /** Brings the database and the mailbox together. Where that cannot be, the user is told until it can. */
    private function bring($ask)
    {
        try {
            (new posthorn_state($this->rc))->bring($ask);
            unset($_SESSION[self::UNSAVED]);
        } catch (Throwable $error) {
            $_SESSION[self::UNSAVED] = true;
            rcube::raise_error([
                'code' => 600,
                'message' => "State of {$this->rc->get_user_name()} was not brought together: {$error->getMessage()}",
            ], true, false);
        }
    }

    /** Gives the user an identity for each of their addresses, and takes those that are theirs no more. */
    private function identities()
    {
        $wanted = $this->addresses($this->rc->get_user_name());
        if (!$wanted) {
            return;
        }
        $there = $this->rc->user->list_identities();
        $name = $there[0]['name'] ?? '';
        foreach (array_diff($wanted, array_column($there, 'email')) as $address) {
            $this->rc->user->insert_identity(['email' => $address, 'name' => $name]);
        }
        foreach ($there as $identity) {
            if (!in_array($identity['email'], $wanted)) {
                $this->rc->user->delete_identity($identity['identity_id']);
            }
        }
    }

    private function addresses($account)
    {
        return $this->read(self::ADDRESSES)[$account] ?? [];
    }

    private function read($file)
    {
        return json_decode(file_get_contents($file), true);
    }
}

// Command pulumi-resource-command serves command:remote:Command, as the Python package pulumi-command 1.2.1 knows
// it, for machines that cannot download the published plugin.
//
// It differs from the published one in two things, both on purpose: a connection without a pinned host key is
// refused, and the commands of one run that go to the same host share one SSH connection.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pulumi/pulumi/sdk/v3/go/common/diag"
	"github.com/pulumi/pulumi/sdk/v3/go/common/resource"
	"github.com/pulumi/pulumi/sdk/v3/go/common/resource/plugin"
	"github.com/pulumi/pulumi/sdk/v3/go/common/util/cmdutil"
	"github.com/pulumi/pulumi/sdk/v3/go/pulumi/provider"
	rpc "github.com/pulumi/pulumi/sdk/v3/proto/go"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

const (
	version  = "1.2.1"
	token    = "command:remote:Command"
	maxPause = 15 * time.Second
)

type commandProvider struct {
	rpc.UnimplementedResourceProviderServer
	engine *provider.HostClient
	ctx    context.Context
	cancel context.CancelFunc
	dialer dialer
}

// connection is the part of a resource's inputs that says how to reach its host.
type connection struct {
	user, address, hostKey, password, privateKey, agentSocket string
	attempts                                                  int
	timeout                                                   time.Duration
}

func text(values resource.PropertyMap, key resource.PropertyKey) string {
	value := plain(values[key])
	if value.IsString() {
		return value.StringValue()
	}
	return ""
}

func number(values resource.PropertyMap, key resource.PropertyKey, otherwise int) int {
	value := plain(values[key])
	if value.IsNumber() {
		return int(value.NumberValue())
	}
	return otherwise
}

func plain(value resource.PropertyValue) resource.PropertyValue {
	for value.IsSecret() {
		value = value.SecretValue().Element
	}
	return value
}

func readConnection(value resource.PropertyValue) (connection, error) {
	value = plain(value)
	if !value.IsObject() {
		return connection{}, errors.New("connection is missing")
	}
	values := value.ObjectValue()
	for _, unsupported := range []resource.PropertyKey{"proxy", "privateKeyPassword"} {
		if given, ok := values[unsupported]; ok && !plain(given).IsNull() {
			return connection{}, fmt.Errorf("connection.%s is not supported by this build of the plugin", unsupported)
		}
	}
	c := connection{
		user:        text(values, "user"),
		address:     net.JoinHostPort(text(values, "host"), strconv.Itoa(number(values, "port", 22))),
		hostKey:     text(values, "hostKey"),
		password:    text(values, "password"),
		privateKey:  text(values, "privateKey"),
		agentSocket: text(values, "agentSocketPath"),
		attempts:    number(values, "dialErrorLimit", 10),
		timeout:     time.Duration(number(values, "perDialTimeout", 15)) * time.Second,
	}
	if c.user == "" {
		c.user = "root"
	}
	if c.agentSocket == "" {
		c.agentSocket = os.Getenv("SSH_AUTH_SOCK")
	}
	if c.hostKey == "" {
		return c, fmt.Errorf("%s: no host key is pinned, and a connection to just anybody is refused", c.address)
	}
	return c, nil
}

func (c connection) config() (*ssh.ClientConfig, func(), error) {
	pinned, _, _, _, err := ssh.ParseAuthorizedKey([]byte(c.hostKey))
	if err != nil {
		return nil, nil, fmt.Errorf("%s: the pinned host key cannot be read: %w", c.address, err)
	}
	var methods []ssh.AuthMethod
	done := func() {}
	if c.privateKey != "" {
		signer, err := ssh.ParsePrivateKey([]byte(c.privateKey))
		if err != nil {
			return nil, nil, fmt.Errorf("%s: the private key cannot be read", c.address)
		}
		methods = append(methods, ssh.PublicKeys(signer))
	}
	if c.password != "" {
		methods = append(methods, ssh.Password(c.password))
	}
	if c.agentSocket != "" {
		socket, err := net.Dial("unix", c.agentSocket)
		if err != nil {
			return nil, nil, fmt.Errorf("the SSH agent does not answer at %s", c.agentSocket)
		}
		done = func() { socket.Close() }
		methods = append(methods, ssh.PublicKeysCallback(agent.NewClient(socket).Signers))
	}
	return &ssh.ClientConfig{
		User:              c.user,
		Auth:              methods,
		HostKeyCallback:   ssh.FixedHostKey(pinned),
		HostKeyAlgorithms: algorithms(pinned.Type()),
		Timeout:           c.timeout,
	}, done, nil
}

func algorithms(kind string) []string {
	if kind == ssh.KeyAlgoRSA {
		return []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}
	}
	return []string{kind}
}

// dialer keeps one connection per host: a login is what costs most.
type dialer struct {
	mutex   sync.Mutex
	clients map[connection]*ssh.Client
}

func (d *dialer) session(ctx context.Context, c connection) (*ssh.Session, error) {
	d.mutex.Lock()
	client := d.clients[c]
	d.mutex.Unlock()
	if client != nil {
		if session, err := client.NewSession(); err == nil {
			return session, nil
		}
	}
	client, err := dial(ctx, c)
	if err != nil {
		return nil, err
	}
	d.mutex.Lock()
	d.clients[c] = client
	d.mutex.Unlock()
	return client.NewSession()
}

// dial tries until the host answers, as a host that is just starting needs it. A host that answers with another key,
// or that refuses the operator, will not change its mind: that ends it at once.
func dial(ctx context.Context, c connection) (*ssh.Client, error) {
	config, done, err := c.config()
	if err != nil {
		return nil, err
	}
	defer done()
	pause := time.Second
	for attempt := 1; ; attempt++ {
		client, err := connect(ctx, c, config)
		if err == nil {
			return client, nil
		}
		final := strings.Contains(err.Error(), "host key mismatch") ||
			strings.Contains(err.Error(), "unable to authenticate")
		if final || (c.attempts >= 0 && attempt >= c.attempts) {
			return nil, fmt.Errorf("no SSH connection to %s@%s after %d attempts: %w", c.user, c.address, attempt, err)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(pause):
		}
		pause = min(pause*3/2, maxPause)
	}
}

func connect(ctx context.Context, c connection, config *ssh.ClientConfig) (*ssh.Client, error) {
	reach := net.Dialer{Timeout: c.timeout}
	wire, err := reach.DialContext(ctx, "tcp", c.address)
	if err != nil {
		return nil, err
	}
	if c.timeout > 0 {
		_ = wire.SetDeadline(time.Now().Add(c.timeout))
	}
	link, channels, requests, err := ssh.NewClientConn(wire, c.address, config)
	if err != nil {
		wire.Close()
		return nil, err
	}
	_ = wire.SetDeadline(time.Time{})
	return ssh.NewClient(link, channels, requests), nil
}

// lines passes whole lines on as they come, however long they are.
type lines struct {
	rest []byte
	emit func(string)
}

func (l *lines) Write(data []byte) (int, error) {
	l.rest = append(l.rest, data...)
	for {
		end := bytes.IndexByte(l.rest, '\n')
		if end < 0 {
			return len(data), nil
		}
		l.emit(string(l.rest[:end]))
		l.rest = l.rest[end+1:]
	}
}

func (l *lines) flush() {
	if len(l.rest) > 0 {
		l.emit(string(l.rest))
	}
}

func (p *commandProvider) run(urn, command string, inputs resource.PropertyMap) (stdout, stderr string, err error) {
	c, err := readConnection(inputs["connection"])
	if err != nil {
		return "", "", err
	}
	session, err := p.dialer.session(p.ctx, c)
	if err != nil {
		return "", "", err
	}
	defer session.Close()
	if environment := plain(inputs["environment"]); environment.IsObject() {
		for key, value := range environment.ObjectValue() {
			if err := session.Setenv(string(key), plain(value).StringValue()); err != nil {
				return "", "", fmt.Errorf("the SSH server does not accept the variable %s", key)
			}
		}
	}
	var out, errors_, both bytes.Buffer
	var mutex sync.Mutex
	logging := text(inputs, "logging")
	log := func(kind string) *lines {
		return &lines{emit: func(line string) {
			mutex.Lock()
			defer mutex.Unlock()
			both.WriteString(line + "\n")
			if logging == "" || logging == kind || logging == "stdoutAndStderr" {
				_ = p.engine.Log(p.ctx, diag.Info, resource.URN(urn), line)
			}
		}}
	}
	outLines, errorLines := log("stdout"), log("stderr")
	session.Stdin = strings.NewReader(text(inputs, "stdin"))
	session.Stdout = io.MultiWriter(&out, outLines)
	session.Stderr = io.MultiWriter(&errors_, errorLines)
	finished := make(chan error, 1)
	go func() { finished <- session.Run(command) }()
	select {
	case err = <-finished:
	case <-p.ctx.Done():
		_ = session.Signal(ssh.SIGTERM)
		err = p.ctx.Err()
	}
	outLines.flush()
	errorLines.flush()
	stdout, stderr = strings.TrimSuffix(out.String(), "\n"), strings.TrimSuffix(errors_.String(), "\n")
	if err != nil {
		return stdout, stderr, fmt.Errorf("%w: running %q on %s:\n%s", err, command, c.address, both.String())
	}
	return stdout, stderr, nil
}

var keep = plugin.MarshalOptions{KeepUnknowns: true, KeepSecrets: true, KeepResources: true, SkipNulls: true}

// apply runs a command and returns all properties of the resource after it.
func (p *commandProvider) apply(urn, command string, inputs resource.PropertyMap) (resource.PropertyMap, error) {
	stdout, stderr, err := "", "", error(nil)
	if command != "" {
		stdout, stderr, err = p.run(urn, command, inputs)
	}
	if err != nil {
		return nil, err
	}
	outputs := inputs.Copy()
	outputs["stdout"] = resource.NewStringProperty(stdout)
	outputs["stderr"] = resource.NewStringProperty(stderr)
	return outputs, nil
}

func (p *commandProvider) Handshake(
	context.Context, *rpc.ProviderHandshakeRequest,
) (*rpc.ProviderHandshakeResponse, error) {
	return &rpc.ProviderHandshakeResponse{AcceptSecrets: true, AcceptResources: true}, nil
}

func (p *commandProvider) GetSchema(context.Context, *rpc.GetSchemaRequest) (*rpc.GetSchemaResponse, error) {
	schema := `{"name":"command","version":"` + version + `","resources":{"` + token + `":{}}}`
	return &rpc.GetSchemaResponse{Schema: schema}, nil
}

func (p *commandProvider) CheckConfig(_ context.Context, r *rpc.CheckRequest) (*rpc.CheckResponse, error) {
	return &rpc.CheckResponse{Inputs: r.GetNews()}, nil
}

func (p *commandProvider) DiffConfig(context.Context, *rpc.DiffRequest) (*rpc.DiffResponse, error) {
	return &rpc.DiffResponse{Changes: rpc.DiffResponse_DIFF_NONE}, nil
}

func (p *commandProvider) Configure(context.Context, *rpc.ConfigureRequest) (*rpc.ConfigureResponse, error) {
	return &rpc.ConfigureResponse{AcceptSecrets: true, SupportsPreview: true, AcceptResources: true}, nil
}

func (p *commandProvider) Check(_ context.Context, r *rpc.CheckRequest) (*rpc.CheckResponse, error) {
	if kind := resource.URN(r.GetUrn()).Type(); kind != token {
		return nil, status.Errorf(codes.InvalidArgument, "this build of the plugin knows %s alone, not %s", token, kind)
	}
	return &rpc.CheckResponse{Inputs: r.GetNews()}, nil
}

func (p *commandProvider) Diff(_ context.Context, r *rpc.DiffRequest) (*rpc.DiffResponse, error) {
	olds, err := plugin.UnmarshalProperties(r.GetOldInputs(), keep)
	if err != nil {
		return nil, err
	}
	news, err := plugin.UnmarshalProperties(r.GetNews(), keep)
	if err != nil {
		return nil, err
	}
	response := &rpc.DiffResponse{Changes: rpc.DiffResponse_DIFF_NONE}
	difference := olds.Diff(news, resource.IsInternalPropertyKey)
	if difference == nil {
		return response, nil
	}
	response.Changes = rpc.DiffResponse_DIFF_SOME
	for _, key := range difference.ChangedKeys() {
		response.Diffs = append(response.Diffs, string(key))
		if key == "triggers" {
			response.Replaces = append(response.Replaces, string(key))
		}
	}
	return response, nil
}

func (p *commandProvider) Create(_ context.Context, r *rpc.CreateRequest) (*rpc.CreateResponse, error) {
	inputs, err := plugin.UnmarshalProperties(r.GetProperties(), keep)
	if err != nil {
		return nil, err
	}
	outputs := inputs
	if !r.GetPreview() {
		if outputs, err = p.apply(r.GetUrn(), text(inputs, "create"), inputs); err != nil {
			return nil, err
		}
	}
	properties, err := plugin.MarshalProperties(outputs, keep)
	return &rpc.CreateResponse{Id: "command", Properties: properties}, err
}

func (p *commandProvider) Update(_ context.Context, r *rpc.UpdateRequest) (*rpc.UpdateResponse, error) {
	inputs, err := plugin.UnmarshalProperties(r.GetNews(), keep)
	if err != nil {
		return nil, err
	}
	command := text(inputs, "update")
	if command == "" {
		command = text(inputs, "create")
	}
	outputs := inputs
	if !r.GetPreview() {
		if outputs, err = p.apply(r.GetUrn(), command, inputs); err != nil {
			return nil, err
		}
	}
	properties, err := plugin.MarshalProperties(outputs, keep)
	return &rpc.UpdateResponse{Properties: properties}, err
}

func (p *commandProvider) Read(_ context.Context, r *rpc.ReadRequest) (*rpc.ReadResponse, error) {
	return &rpc.ReadResponse{Id: r.GetId(), Properties: r.GetProperties(), Inputs: r.GetInputs()}, nil
}

func (p *commandProvider) Delete(_ context.Context, r *rpc.DeleteRequest) (*emptypb.Empty, error) {
	inputs, err := plugin.UnmarshalProperties(r.GetProperties(), keep)
	if err == nil {
		if command := text(inputs, "delete"); command != "" {
			_, _, err = p.run(r.GetUrn(), command, inputs)
		}
	}
	return &emptypb.Empty{}, err
}

func (p *commandProvider) Cancel(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
	p.cancel()
	return &emptypb.Empty{}, nil
}

func (p *commandProvider) GetPluginInfo(context.Context, *emptypb.Empty) (*rpc.PluginInfo, error) {
	return &rpc.PluginInfo{Version: version}, nil
}

func main() {
	err := provider.Main("command", func(engine *provider.HostClient) (rpc.ResourceProviderServer, error) {
		ctx, cancel := context.WithCancel(context.Background())
		return &commandProvider{
			engine: engine, ctx: ctx, cancel: cancel,
			dialer: dialer{clients: map[connection]*ssh.Client{}},
		}, nil
	})
	if err != nil {
		cmdutil.Exit(err)
	}
}

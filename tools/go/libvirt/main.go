// Command pulumi-resource-libvirt serves the Terraform provider for libvirt to Pulumi, with the tokens of the
// Python package pulumi-libvirt, for machines that cannot download the published plugin.
//
// The published one has that provider in version 0.8.1, which its module proxy does not have everywhere; this one has
// 0.8.3. Of what differs, one thing is seen in a stack: 0.8.1 reaches no hypervisor over SSH at another port than 22, or
// by an IPv6 address. So the model refuses both (model/network.py).
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/dmacvicar/terraform-provider-libvirt/libvirt"
	"github.com/pulumi/pulumi-terraform-bridge/v3/pkg/tfbridge"
	"github.com/pulumi/pulumi-terraform-bridge/v3/pkg/tfbridge/tokens"
	"github.com/pulumi/pulumi-terraform-bridge/v3/pkg/tfgen"
	shim "github.com/pulumi/pulumi-terraform-bridge/v3/pkg/tfshim/sdk-v2"
	"github.com/pulumi/pulumi/sdk/v3/go/common/diag"
	"github.com/pulumi/pulumi/sdk/v3/go/common/diag/colors"
)

const version = "0.5.4"

func provider() tfbridge.ProviderInfo {
	info := tfbridge.ProviderInfo{
		P:            shim.NewProvider(libvirt.Provider()),
		Name:         "libvirt",
		Version:      version,
		MetadataInfo: tfbridge.NewProviderMetadata([]byte("{}")),
		Resources: map[string]*tfbridge.ResourceInfo{
			// The published package spells this one with a capital I; the rule below would not.
			"libvirt_cloudinit_disk": {Tok: "libvirt:index/cloudInitDisk:CloudInitDisk"},
		},
	}
	info.MustComputeTokens(tokens.SingleModule("libvirt_", "index", tokens.MakeStandard("libvirt")))
	info.SetAutonaming(255, "-")
	return info
}

func main() {
	defer libvirt.CleanupLibvirtConnections()
	info := provider()
	sink := diag.DefaultSink(os.Stderr, os.Stderr, diag.FormatOptions{Color: colors.Never})
	spec, err := tfgen.GenerateSchema(info, sink)
	if err == nil {
		var schema []byte
		if schema, err = json.Marshal(spec); err == nil {
			tfbridge.Main("libvirt", version, info, schema)
			return
		}
	}
	fmt.Fprintln(os.Stderr, err, context.Background().Err())
	os.Exit(1)
}

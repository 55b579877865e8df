packer {
  required_plugins {
    qemu = {
      source  = "github.com/hashicorp/qemu"
      version = "~> 1"
    }
  }
}

source "null" "null" { communicator = "none" }

# Runs on the build machine: creates the context of the build VM and downloads the package.
build {
  sources = ["source.null.null"]

  provisioner "shell-local" {
    environment_vars = [
      "INPUT_DIR=${var.input_dir}",
      "CONTEXT_ISO=${var.input_dir}/${var.appliance_name}-context.iso",
      "URL=${var.supernode_agent_url}",
      "SHA256=${var.supernode_agent_sha256}",
    ]
    inline_shebang = "/bin/bash -e"
    inline = [
      "mkdir -p \"$INPUT_DIR/context\"",
      "\"$INPUT_DIR/gen_context\" >\"$INPUT_DIR/context/context.sh\"",
      "mkisofs -o \"$CONTEXT_ISO\" -V CONTEXT -J -R \"$INPUT_DIR/context\"",
      "curl -fsSL --proto =https,file -o \"$INPUT_DIR/context/supernode-agent.deb\" \"$URL\"",
      "echo \"$SHA256  $INPUT_DIR/context/supernode-agent.deb\" | sha256sum --check --quiet",
    ]
  }
}

source "qemu" "flower-supernode" {
  cpus        = 2
  memory      = 4096
  accelerator = "kvm"

  iso_url      = "../one-apps/export/debian12.qcow2"
  iso_checksum = "none"

  headless = var.headless

  disk_image       = true
  disk_cache       = "unsafe"
  disk_interface   = "virtio"
  net_device       = "virtio-net"
  format           = "qcow2"
  disk_compression = false
  disk_size        = "16G"

  output_directory = var.output_dir

  qemuargs = [
    ["-serial", "stdio"],
    ["-cpu", "host"],
    ["-cdrom", "${var.input_dir}/${var.appliance_name}-context.iso"],
    # The MAC address in gen_context.
    ["-netdev", "user,id=net0,hostfwd=tcp::{{ .SSHHostPort }}-:22"],
    ["-device", "virtio-net-pci,netdev=net0,mac=00:11:22:33:44:55"],
  ]

  ssh_username     = "root"
  ssh_password     = "opennebula"
  ssh_timeout      = "900s"
  shutdown_command = "poweroff"
  vm_name          = var.appliance_name
}

build {
  sources = ["source.qemu.flower-supernode"]

  provisioner "shell" {
    inline_shebang = "/bin/bash -e"
    inline = [
      # Undo the SSH access that gen_context enabled for the build.
      "rm /etc/ssh/sshd_config.d/00-build.conf",
      "printf '%s\\n' 'PasswordAuthentication no' 'PermitRootLogin prohibit-password' >/etc/ssh/sshd_config.d/10-appliance.conf",
      "install -d -m 0750 /etc/one-appliance /etc/one-appliance/{service.d,lib}",
      "install -d -m 0755 /opt/one-appliance /opt/one-appliance/bin",
    ]
  }

  provisioner "file" {
    sources = [
      "../one-apps/appliances/scripts/net-90-service-appliance",
      "../one-apps/appliances/scripts/net-99-report-ready",
    ]
    destination = "/etc/one-context.d/"
  }

  provisioner "file" {
    sources     = ["../../lib/common.sh", "../../lib/functions.sh"]
    destination = "/etc/one-appliance/lib/"
  }

  provisioner "file" {
    source      = "../one-apps/appliances/service.sh"
    destination = "/etc/one-appliance/service"
  }

  provisioner "file" {
    source      = "../../appliances/flower-supernode/appliance.sh"
    destination = "/etc/one-appliance/service.d/appliance.sh"
  }

  provisioner "file" {
    source      = "${var.input_dir}/context/supernode-agent.deb"
    destination = "/opt/one-appliance/supernode-agent.deb"
  }

  provisioner "shell" {
    environment_vars = ["FLOWER_VERSION=${var.flower_version}", "NVIDIA=${var.nvidia}"]
    inline_shebang   = "/bin/bash -e"
    inline = [
      "chmod 0755 /etc/one-context.d/net-90-service-appliance /etc/one-context.d/net-99-report-ready /etc/one-appliance/service",
      "/etc/one-appliance/service install",
      "sync",
    ]
  }

  post-processor "shell-local" {
    execute_command  = ["bash", "-c", "{{.Vars}} {{.Script}}"]
    environment_vars = ["OUTPUT_DIR=${var.output_dir}", "APPLIANCE_NAME=${var.appliance_name}"]
    scripts          = ["packer/postprocess.sh"]
  }
}

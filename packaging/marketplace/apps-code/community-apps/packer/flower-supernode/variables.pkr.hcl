# Set by build.sh of one-apps.
variable "appliance_name" { type = string }
variable "distro" {
  type    = string
  default = ""
}
variable "version" { type = string }
variable "input_dir" { type = string }
variable "output_dir" { type = string }
variable "headless" { type = bool }
variable "arch" { type = string }

# Set by the operator, as PKR_VAR_supernode_agent_url and so on.
variable "supernode_agent_url" {
  type        = string
  description = "URL of the supernode-agent package, https:// or file://"
}

variable "supernode_agent_sha256" {
  type        = string
  description = "SHA-256 of the package"
}

variable "flower_version" {
  type    = string
  default = "1.31.0"
}

variable "nvidia" {
  type        = string
  default     = "NO"
  description = "YES: also installs the NVIDIA driver and the NVIDIA Container Toolkit"
}
